"""One process of the gate.

Its text is handed to the interpreter of the tree that is to be measured (``python -c``), so that it may know nothing
but what every linbench has: a runner that takes requests and answers with outcomes.

Requests come as lines of JSON; every answer is a line of JSON, too.
"""

import json
import sys


def main() -> None:
    """Answer all requests, in children of one fork server: one memory layout, one sample."""
    from linbench.protocol import ForeseeRequest, MeasureRequest
    from linbench.runner import Runner

    with Runner() as runner:
        for line in sys.stdin:
            asked = json.loads(line)
            if asked["kind"] == "foresee":
                text = runner.foresee(ForeseeRequest.model_validate(asked["request"])).model_dump_json()
            else:
                outcome = runner.measure(MeasureRequest.model_validate(asked["request"]), asked["limit_s"])
                text = outcome.model_dump_json(by_alias=True, exclude_none=True)
            print(text, flush=True)


if __name__ == "__main__":
    main()
