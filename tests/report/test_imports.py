import subprocess
import sys


def test_report_needs_neither_torch_nor_a_global_figure_manager():
    code = (
        "import sys, linbench.report, linbench.stats; print(*sorted({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
