"""The front end to Hydra: flags and overrides in, a checked configuration out, its errors in one sentence each."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra import main as hydra_main
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from linbench import registry
from linbench.config import GROUPS, Config, config_dir, name_of, parse
from linbench.errors import UsageError

if TYPE_CHECKING:
    Task = Callable[[DictConfig, str], int]

FLAGS_WITH_VALUE = (
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--package",
    "-p",
    "--cfg",
    "-c",
)
INFO_KINDS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def compose_and_call(task: Task, verb: str, argv: Sequence[str]) -> int:
    """Let Hydra compose the configuration and hand it to ``task``.

    Hydra's own flags (``--cfg job``, ``--info``, ``--config-dir DIR``, ``--multirun``, ``--help``) work as everywhere,
    and may also follow the overrides.

    Raises:
        UsageError: whatever Hydra or OmegaConf refuses.
    """
    codes: list[int] = []
    refusals: list[UsageError] = []  # kept from Hydra, which would print a line of its own about them

    flags, overrides = _sorted(argv)
    naming = f"hydra.help.app_name=linbench {verb}"

    def job(config: DictConfig) -> None:
        asked = HydraConfig.get().overrides
        kept = [flag for flag in flags if flag not in ("--multirun", "-m")]
        hydras = [word for word in asked.hydra if word != naming and not word.startswith("hydra.mode=")]
        try:
            codes.append(task(config, shlex.join(["linbench", verb, *kept, *asked.task, *hydras])))
        except UsageError as error:
            refusals.append(error)

    sys.argv = [f"linbench {verb}", *flags, *overrides, naming]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of printing a page and exiting with 1
    try:
        _hydra_main()(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_sentence(error, flags)) from error
    if refusals:
        raise refusals[0]
    return max(codes, default=0)


def hydra_completion(argv: Sequence[str]) -> int:
    """Answer the shell's question, or print the script to install."""
    sys.argv = ["linbench", *argv]
    _hydra_main()(lambda _config: None)()
    return 0


def checked(config: DictConfig) -> Config:
    """The schema's view of a composed configuration.

    Raises:
        UsageError: see :func:`linbench.config.parse`.
    """
    raw: Any = OmegaConf.to_container(config, resolve=True)
    choices = HydraConfig.get().runtime.choices
    return parse(raw, {group: options(group) for group in GROUPS}, str(choices.get("sweep") or "run"))


def options(group: str, further: Sequence[Path] = ()) -> list[str]:
    """The choices of a group: files in linbench's configs and in ``further`` folders, and installed plug-ins."""
    names = {path.stem for folder in (config_dir(), *further) for path in (folder / group).glob("*.yaml")}
    return sorted(names | (set(registry.plug_ins()) if group == "mechanism" else set()))


def _hydra_main() -> Callable[[Callable[[DictConfig], None]], Callable[[], Any]]:
    store = ConfigStore.instance()
    for name, target in registry.plug_ins().items():
        if name not in registry.BUILT_IN:
            store.store(group="mechanism", name=name, node={name: {"_target_": target}})
    version = tuple(int(part) for part in hydra.__version__.split(".")[:2])
    base: dict[str, Any] = {} if version >= (1, 4) else {"version_base": "1.3"}  # 1.4 warns about the argument
    return hydra_main(config_path=str(config_dir()), config_name="config", **base)


def _sorted(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags and overrides apart: Hydra 1.3 wants the flags first."""
    flags: list[str] = []
    overrides: list[str] = []
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("-"):
            overrides += _traced(word)
        elif word in ("--info", "-i"):
            flags += [word, waiting.pop(0) if waiting and waiting[0] in INFO_KINDS else "all"]
        elif word in FLAGS_WITH_VALUE:
            if not waiting:
                raise UsageError(f"{word} needs a value")
            flags += [word, waiting.pop(0)]
        else:
            flags.append(word)
    return flags, [*_opened(overrides), *_joining(overrides)]


def _traced(word: str) -> list[str]:
    """``inputs=FILE.safetensors`` is the family of captured inputs with that file."""
    key, _, value = word.partition("=")
    if key != "inputs" or not value.endswith(".safetensors"):
        return [word]
    quoted = value.replace("\\", "\\\\").replace("'", "\\'")
    return ["inputs=trace", f"inputs.trace.file='{quoted}'"]


def _opened(overrides: Sequence[str]) -> list[str]:
    """What no file lists may be set: import paths, and the hyperparameters of mechanisms that are not ours."""
    targets = [value for key, _, value in (word.partition("=") for word in overrides) if key == "mechanism._target_"]
    foreign = {name_of(path) for path in re.findall(r"[\w.]+\.\w+", ",".join(targets))}
    foreign |= registry.plug_ins().keys() - registry.BUILT_IN.keys()
    opened = []
    for word in overrides:
        group, _, rest = word.partition("=")[0].partition(".")
        name, _, parameter = rest.partition(".")
        new = group == "mechanism" and (name == "_target_" or (name in foreign and parameter))
        opened.append(f"++{word}" if new else word)
    return opened


def _joining(overrides: Sequence[str]) -> list[str]:
    """Installed plug-ins take part in every sweep, unless the command line says which mechanisms do."""
    keys = [word.partition("=")[0].lstrip("+") for word in overrides]
    if "sweep" not in keys or "mechanism" in keys:
        return []
    foreign = {name: path for name, path in registry.plug_ins().items() if name not in registry.BUILT_IN}
    return [f"++mechanism.{name}._target_={path}" for name, path in sorted(foreign.items())]


def _sentence(error: Exception, flags: Sequence[str]) -> str:
    """Hydra's error as one sentence that names the value and the choices."""
    named = [Path(value) for flag, value in pairwise(flags) if flag in ("--config-dir", "-cd")]
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"unknown {group} '{name}'; choose from {', '.join(options(group, named)) or 'nothing: there is none'}"
    if isinstance(error, OverrideParseException):
        return f"cannot read the override '{error.override}'; write key=value, and a list as key=[a,b]"
    first = _first_line(error)
    if first.startswith("Could not override '"):
        return _not_there(first.split("'")[1])
    return first


def _not_there(key: str) -> str:
    """A key that the configuration does not have."""
    group, _, rest = key.partition(".")
    name, _, parameter = rest.partition(".")
    if group in GROUPS and name in options(group):
        found: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / group / f"{name}.yaml"))
        known = [parameter for parameter in found.get(name, {}) if parameter != "_target_"]
        if parameter in known:
            return f"{key}: {name} is not among the chosen ones; add it to {group}=[...]"
        return f"unknown key '{key}'; {name} has {', '.join(known) or 'no parameters'}"
    if group in GROUPS and name:
        return f"unknown {group} '{name}' in '{key}'; choose from {', '.join(options(group))}"
    if key == "sweep":
        return f"a sweep is added with a plus: +sweep=NAME; choose from {', '.join(options('sweep'))}"
    known = [str(name) for name in OmegaConf.load(config_dir() / "config.yaml") if name not in ("defaults", "hydra")]
    near = difflib.get_close_matches(key, [*known, *GROUPS], n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return f"unknown key '{key}'{hint}; choose from {', '.join([*GROUPS, *known])}"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
