"""How good the noise is, measured: its arithmetic word by word, its distribution, its independence.

    python -m fastgen.bench.noise_quality [PART ...] [--quick] [--out FILE]

Parts: exact, sample, correlation, words, practrand, testu01 (all by default). Needs g++. FILE is
JSON and keeps the parts found on the same day and machine; a report (.md) and a picture (.png) are
written beside it. PractRand runs where RNG_test is on PATH, TestU01 where g++ finds it (CPATH,
LIBRARY_PATH).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from scipy import stats

import fastgen
from fastgen.bench import noise_quality_report
from fastgen.bench.timing import machine

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
HEADERS = ("macros.h", "elementary.h", "normal.h", "philox.h")
# As the extension is built; no -march, the bits do not depend on it.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
TESTU01 = ["-DTESTU01", "-ltestu01", "-lprobdist", "-lmylib", "-lm"]
ORDERS = ("blocks", "samples", "steps", "streams", "seeds", "fresh seeds")
RARE = re.compile(r"(unusual|suspicious|SUSPICIOUS|FAIL)")


def compiled(folder: Path, *options: str) -> Path | None:
    """The program of noise_quality.cpp; None where it does not build."""
    program = folder / f"noise_quality{len(options)}"
    source = HERE / "noise_quality.cpp"
    command = ["g++", *FLAGS, f"-I{CSRC}", str(source), "-o", str(program), *options]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode and not options:
        sys.exit(built.stderr)
    return None if built.returncode else program


def output(*command: object, **options) -> bytes:
    arguments = [str(each) for each in command]
    return subprocess.run(arguments, stdout=subprocess.PIPE, check=True, **options).stdout


def exact(program: Path) -> dict:
    """Every one of the 2^32 radius words and 2^32 angle words."""
    found = json.loads(output(program, "exact"))
    radius, cosine, sine = (found.pop(f"{name}_moments") for name in ("radius", "cos", "sin"))
    # E[z^k] = E[r^k] E[c^k]: the words are independent.
    found["moments"] = {
        name: [r * c for r, c in zip(radius, trigonometric, strict=True)]
        for name, trigonometric in (("cos", cosine), ("sin", sine))
    }
    found["covariance"] = radius[2] * found.pop("cos_sin")
    found["square_covariance"] = (
        radius[4] * found.pop("cos2_sin2") - found["moments"]["cos"][2] * found["moments"]["sin"][2]
    )
    # The angle's law enters by Koksma's inequality (a variation of at most 2), the errors of the
    # cosine and of the product as a relative shift of z: |z| phi(z) <= 0.242.
    shift = max(found["cos"]["ulp"], found["sin"]["ulp"]) * 2.0**-23 + 2.0**-24
    found["ks_bound"] = found["radius_ks"] + 2 * found["angle_ks"] + 0.242 * shift
    greatest = found["greatest_radius"]
    found["normal_mass_beyond"] = 2 * stats.norm.sf(greatest)
    return found


def sample(program: Path, quick: bool) -> dict:
    """The distribution of many normals in each order, and that they are fastgen.randn's."""
    count = 1 << 20
    here = torch.frombuffer(bytearray(output(program, "normals", count)), dtype=torch.int32)
    ours = fastgen.randn((1, count), seed=0)[0].view(torch.int32)
    assert torch.equal(here, ours), "the program's normals are not fastgen.randn's"
    power = 26 if quick else 31
    found = {order: json.loads(output(program, "sample", order, power)) for order in ORDERS}
    truth = stats.norm.cdf(np.arange(4097) / 256 - 8)
    expected = np.diff(truth) * 2.0**power
    inner = expected >= 25
    total = np.zeros(4096)
    for each in found.values():
        histogram = np.array(each.pop("histogram"), dtype=float)
        total += histogram
        distance = np.abs(np.cumsum(histogram) / 2.0**power - truth[1:]).max()
        seen = np.append(histogram[inner], histogram[~inner].sum())
        mean = np.append(expected[inner], expected[~inner].sum())
        chi2 = ((seen - mean) ** 2 / mean).sum()
        each |= {
            "ks": distance,
            "ks_p": stats.kstwobign.sf(distance * 2.0 ** (power / 2)),
            "chi2": chi2,
            "chi2_bins": seen.size,
            "chi2_p": stats.chi2.sf(chi2, seen.size - 1),
        }
    return {
        "log2_count": power,
        "equal_to_randn": count,
        "orders": found,
        "histogram": total.astype(int).tolist(),
    }


def of_many(scores: np.ndarray) -> dict:
    """The largest of many z-scores, what to expect of it, and how often chance exceeds it."""
    worst, count = float(np.abs(scores).max()), scores.size
    return {
        "pairs": count,
        "max": worst,
        "expected": float(stats.norm.ppf((1 + 0.5 ** (1 / count)) / 2)),  # the median
        "p": float(-math.expm1(count * math.log1p(-2 * stats.norm.sf(worst)))),
        "rms": float(np.sqrt(np.mean(scores**2))),
    }


def pairs(rows: np.ndarray) -> dict:
    """Pearson correlation of every two rows, of their values and of their squares."""
    upper = np.triu_indices(len(rows), 1)
    scale = math.sqrt(rows.shape[1])
    return {
        name: of_many(np.corrcoef(values)[upper] * scale)
        for name, values in (("values", rows), ("squares", rows * rows))
    }


def correlation(quick: bool) -> dict:
    """Normals of neighbouring seeds, samples, steps and streams, and along one sample."""
    rows, elements = 64, 1 << (16 if quick else 20)
    shape, same = (rows, elements), [0] * rows

    def along(argument: str) -> np.ndarray:
        return np.concatenate(
            [fastgen.randn((1, elements), **{"seed": 0} | {argument: i}) for i in range(rows)]
        )

    found = {"elements": elements}
    sets = {
        "seeds 0 to 63": lambda: fastgen.randn(shape, seed=range(rows), sample_ids=same).numpy(),
        "seeds 2^0 to 2^63": lambda: fastgen.randn(
            shape, seed=[1 << i for i in range(rows)], sample_ids=same
        ).numpy(),
        "samples 0 to 63": lambda: fastgen.randn(shape, seed=0).numpy(),
        "steps 0 to 63": lambda: along("step"),
        "streams 0 to 63": lambda: along("stream"),
    }
    for name, make in sets.items():
        found[name] = pairs(make())
    z = fastgen.randn((1, elements * 16), seed=0)[0].numpy()
    found["the four of a block"] = pairs(z.reshape(-1, 4).T)
    lags = range(1, 65)
    found["lags 1 to 64"] = {
        name: of_many(
            np.array([np.dot(v[:-k], v[k:]) / math.sqrt(v.size - k) for k in lags]) / v.var()
        )
        for name, v in (("values", z.astype(float)), ("squares", z.astype(float) ** 2 - 1))
    }
    return found


def raw_words(program: Path, order: str, count: int) -> np.ndarray:
    with subprocess.Popen([program, "words", order, "forward"], stdout=subprocess.PIPE) as source:
        data = source.stdout.read(4 * count)
        source.kill()
    return np.frombuffer(data, dtype=np.uint32)


def words(program: Path, quick: bool) -> dict:
    """Bytes by their place in a block, and repeated words."""
    lots, size = 4 if quick else 64, 1 << 20
    space = 2.0**32
    expected = lots * (size + space * math.expm1(size * math.log1p(-1 / space)))
    found = {"words": lots * size, "expected_repeats": expected}
    for order in ORDERS:
        drawn = raw_words(program, order, lots * size)
        repeats = int(sum((np.diff(np.sort(lot)) == 0).sum() for lot in drawn.reshape(lots, size)))
        columns = drawn.view(np.uint8).reshape(-1, 16)
        mean = len(columns) / 256
        chi2 = [
            float(((np.bincount(column, minlength=256) - mean) ** 2 / mean).sum())
            for column in columns.T
        ]
        p = stats.chi2.sf(chi2, 255)
        found[order] = {
            "repeats": repeats,
            "repeats_z": (repeats - expected) / math.sqrt(expected),
            "worst_place_p": -math.expm1(16 * math.log1p(-p.min())),
            "all_bytes_p": float(stats.chi2.sf(sum(chi2), 255 * 16)),
        }
    return found


def practrand_of(program: Path, tester: str, order: str, bits: str, length: str) -> dict:
    with subprocess.Popen([program, "words", order, bits], stdout=subprocess.PIPE) as source:
        options = ("-tlmin", "64MB", "-tlmax", length)
        text = output(tester, "stdin32", *options, stdin=source.stdout).decode()
        source.kill()
    reached, count, listed = 0, 0, []
    for line in text.splitlines():
        if found := re.search(r"^length= .*\(2\^(\d+) bytes\)", line):
            reached = int(found[1])
        elif found := re.search(r"(?:no anomalies in|and) (\d+) test result", line):
            count += int(found[1])
        elif RARE.search(line):
            count += 1
            listed.append(f"2^{reached}: {' '.join(line.split())}")
    return {
        "version": re.search(r"version ([\d.]+)", text)[1],
        "order": order,
        "bits": bits,
        "log2_bytes": reached,
        "results": count,
        "anomalies": listed,
    }


def practrand(program: Path, quick: bool) -> list[dict]:
    """PractRand's standard tests, an entry for each order of the words."""
    tester = shutil.which("RNG_test")
    if not tester:
        return [{"absent": "no RNG_test on PATH (Debian 12 has no package of PractRand)"}]
    entries = []
    lengths = {"blocks": "16GB", "steps": "16GB"}
    for order, bits, length in (
        *((order, "forward", lengths.get(order, "8GB")) for order in ORDERS),
        ("blocks", "reversed", "4GB"),
        ("samples", "reversed", "4GB"),
    ):
        entry = practrand_of(program, tester, order, bits, "256MB" if quick else length)
        print(entry, flush=True)
        entries.append(entry)
    return entries


def testu01(program: Path | None, crush: bool) -> list[dict]:
    """SmallCrush on every order of the words, both ways round, and Crush on the plain one."""
    if not program:
        return [{"absent": "g++ found no TestU01 (Debian 12 has no package of it)"}]
    entries = []
    runs = [("smallcrush", order, bits) for order in ORDERS for bits in ("forward", "reversed")]
    for battery, order, bits in [*runs, ("crush", "blocks", "forward")][: None if crush else -1]:
        text = output(program, battery, order, bits).decode()
        summary = text[text.rindex("Summary results") :]
        entry = {
            "version": re.search(r"TestU01 ([\d.]+)", summary).group(1),
            "battery": battery,
            "order": order,
            "bits": bits,
            "statistics": int(re.search(r"statistics:\s+(\d+)", summary).group(1)),
            "passed": "All tests were passed" in summary,
            "anomalies": re.findall(r"^\s*(\d+ .*\S)\s*$", summary, re.MULTILINE),
        }
        print(entry, flush=True)
        entries.append(entry)
    return entries


def environment() -> dict:
    compiler = output("g++", "--version").decode().splitlines()[0]
    digest = hashlib.sha256(b"".join((CSRC / "math" / name).read_bytes() for name in HEADERS))
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "compiler": compiler,
        "headers_sha256": digest.hexdigest(),
    }


def save(file: Path, made: dict, part: str, result: dict | list) -> None:
    """Adds a part to the file as it now stands, and writes the report anew."""
    file.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(file.read_text()) if file.exists() else {}
    if any(found.get(key) != value for key, value in made.items()):
        found = dict(made)
    found[part] = result
    file.write_text(json.dumps(found) + "\n")
    noise_quality_report.write(found, file)


def main() -> None:
    parts = ("exact", "sample", "correlation", "words", "practrand", "testu01")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    parser.add_argument("--quick", action="store_true", help="small samples, for a look")
    parser.add_argument("--crush", action="store_true", help="TestU01's Crush too (half an hour)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "noise_quality.json")
    given = parser.parse_args()
    chosen = given.parts or parts
    if unknown := set(chosen) - set(parts):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(parts)}")
    made = {"environment": environment(), "quick": given.quick}
    with tempfile.TemporaryDirectory() as folder:
        program = compiled(Path(folder))
        runs = {
            "exact": lambda: exact(program),
            "sample": lambda: sample(program, given.quick),
            "correlation": lambda: correlation(given.quick),
            "words": lambda: words(program, given.quick),
            "practrand": lambda: practrand(program, given.quick),
            "testu01": lambda: testu01(compiled(Path(folder), *TESTU01), given.crush),
        }
        for part in chosen:
            start = time.perf_counter()
            result = runs[part]()
            print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
            save(given.out, made, part, result)


if __name__ == "__main__":
    main()
