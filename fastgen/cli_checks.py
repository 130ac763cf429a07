"""``fastgen verify`` and ``fastgen bench``: is it right here, and how fast."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import fastgen


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """What is imported inside comes with an extra, which an ImportError names."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"needs {error.name} (pip install fastgen-samplers[{name}])") from None


def add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="check every op and backend on this machine against eager PyTorch and float64",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    verify.add_argument("ops", nargs="*", metavar="op", help="the ops to check; all if none")
    verify.add_argument("--backend", action="append", help="only this one; may be repeated")
    verify.add_argument("--cases", type=int, default=50, help="of each op, backend and dtype")
    verify.add_argument("--seed", type=int, default=0, help="of the random cases")
    verify.add_argument("--save", type=Path, help="JSON to write the verdicts to")
    verify.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    with _extra("cli"):
        from hypothesis import configuration
        from rich.console import Console
        from rich.table import Table
        from tqdm.auto import tqdm

        from fastgen.verify import verify

    if options.cases < 1:
        raise ValueError(f"--cases: got {options.cases}, expected at least 1")
    _check_file(options.save)
    found = verify(options.ops, options.backend or (), cases=options.cases, seed=options.seed)
    with tempfile.TemporaryDirectory() as folder:  # hypothesis keeps notes of its own
        configuration.set_hypothesis_home_dir(folder)
        verdicts = list(tqdm(found, desc="verifying", unit="verdict", leave=False,
                             disable=None))  # fmt: skip
    table = Table(title=f"fastgen {fastgen.__version__}, torch {torch.__version__}")
    for column in (
        "op",
        "backend",
        "dtype",
        "cases",
        "same bits",
        "worst ulp",
        "error / PyTorch's",
    ):
        table.add_column(column, justify="left" if column in ("op", "backend") else "right")
    for v in verdicts:
        same = "yes" if v.bitwise else "NO" if v.what else "not promised"
        numbers = (str(v.cases), same, str(v.ulps), f"{v.ratio:.2f}")
        table.add_row(v.op, v.backend, v.dtype, *numbers, style="red" if v.what else None)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    breaches = [v for v in verdicts if v.what]
    for v in breaches:
        print(f"{v.op} on {v.backend}, {v.dtype}: {v.what}\n    {v.line}")
    if options.save is not None:
        facts = {"fastgen": fastgen.__version__, "torch": torch.__version__, "seed": options.seed}
        options.save.write_text(
            json.dumps({**facts, "verdicts": [v.row() for v in verdicts]}, indent=1) + "\n"
        )
    print("every promise kept" if not breaches else f"{len(breaches)} broken, see above")
    return 1 if breaches else 0


def _check_file(path: Path | None) -> None:
    """ValueError, before the work is done, where no file can be written."""
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise ValueError(f"--save: {path} cannot be written")


def add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench", help="time every op beside eager PyTorch, torch.compile, diffusers and others"
    )
    bench.add_argument(
        "ops", nargs="*", metavar="op",
        help="which benchmarks: step, guidance, forward, noise, reparameterize, conv_transpose, "
        "fuse, sampling, diffusers, sizes, process; all if none",
    )  # fmt: skip
    bench.add_argument(
        "--against",
        default="",
        metavar="PEERS",
        help="some of eager,compile,diffusers,k-diffusion,torch,copy_; all if not given",
    )
    bench.add_argument("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    bench.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    bench.add_argument("--save", type=Path, metavar="FILE", help="JSON to write the results to")
    bench.add_argument(
        "--compare", type=Path, metavar="FILE", help="an earlier result; exit with 1 if slower now"
    )
    bench.add_argument("--draw", type=Path, metavar="FOLDER", help="where to draw pictures")
    bench.set_defaults(run=_bench)


def _timed(
    options: argparse.Namespace, ops: Sequence[str], save: Path | None = None, apart: bool = False
) -> tuple[int, Any]:
    """(exit status, the results, or None where nothing was timed)."""
    from fastgen.bench import report
    from fastgen.bench.run import run

    with tempfile.TemporaryDirectory() as folder:  # a run that is broken off leaves nothing
        file = Path(folder) / "results.json"
        file.touch()
        status = run(ops, file, against=options.against, quick=options.quick,
                     device=options.device, apart=apart)  # fmt: skip
        if file.stat().st_size == 0:
            return status or 1, None
        if save is not None:
            shutil.copy(file, save)
        return status, report.load(file)


def _bench(options: argparse.Namespace) -> int:
    with _extra("bench"):
        from fastgen.bench import report, run  # noqa: F401

    old = None if options.compare is None else report.load(options.compare)
    _check_file(options.save)
    if options.draw is not None and not options.draw.is_dir():
        raise ValueError(f"--draw: {options.draw} is not a folder")
    if old is not None and options.ops and not {r.file for r in old.records} & set(options.ops):
        raise ValueError(f"--compare: {options.compare} has none of the cases that would be timed")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5 * torch.get_num_threads():
        print(f"the machine is busy (load {load:.1f}): times will be longer, and comparisons wrong")
    status, results = _timed(options, options.ops, options.save)
    if results is None:
        return status
    report.show(results)
    if options.draw is not None:
        for picture in report.draw(results, options.draw):
            print(f"wrote {picture}")
    if old is None:
        return status
    if not {record.key for record in old.records} & {record.key for record in results.records}:
        raise ValueError(f"--compare: {options.compare} has none of the cases that were timed")
    for difference in report.differences(old, results):
        print(f"compared with another kind of run: {difference}")
    suspects = report.slower(old, results)
    if suspects:  # a neighbour on the machine, or a slower kernel: the same again tells
        print(f"{len(suspects)} cases look slower; their benchmarks are timed again", flush=True)
        _, again = _timed(options, sorted({record.file for record in suspects}), apart=True)
        lasting = set() if again is None else {r.key for r in report.slower(old, again)}
        suspects = {r: line for r, line in suspects.items() if r.key in lasting}
    print("\n".join(suspects.values()) if suspects else "nothing became slower")
    return 1 if suspects else status
