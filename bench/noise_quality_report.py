"""The report and the picture of noise_quality.py's results."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

COMMANDS = "python -m fastgen.bench.noise_quality"


def table(head: tuple[str, ...], rows: list[tuple]) -> list[str]:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return [lines[0], "|" + " --- |" * len(head), *lines[1:], ""]


def exact(found: dict) -> list[str]:
    rows = [(name, f"{found[name]['ulp']:.3f}", float.fromhex(found[name]["at"]))
            for name in ("log", "radius", "cos", "sin", "exp")]  # fmt: skip
    moments = [(f"E[z^{k}]", want, *(f"{found['moments'][name][k] - want:+.2e}"
                                     for name in ("cos", "sin")))
               for k, want in enumerate((1, 0, 1, 0, 3, 0, 15, 0, 105)) if k]  # fmt: skip
    tails = [(t, f"{p:.6e}", f"{p / stats.norm.sf(t) - 1:+.1e}") for t, p in found["tails"]]
    return [
        "## Every word, exactly",
        "",
        f"All 2^32 radius words and all 2^32 angle words, against float64. u takes "
        f"{found['distinct_u']:,} float32 values, from {found['least_u']} (never 0) to "
        f"{found['greatest_u']}; {found['words_of_radius_zero']:.0f} words give u = 1 and so "
        f"r = 0. r takes {found['distinct_radii']:,} values.",
        "",
        *table(("function", "worst error, ulp of the result", "at"), rows),
        "log, radius = sqrt(-2 log u), cos and sin of 2 pi u over every u; exp, which scales "
        "learned variances, over every x of at least 2^-26 in size with a normal float32 result. "
        f"(cos, sin) leaves the unit circle by at most {found['norm_error']:.2e} of its radius.",
        "",
        "Moments of z0 = r cos and z1 = r sin over all words, before the product is rounded:",
        "",
        *table(("moment", "normal", "z0, difference", "z1, difference"), moments),
        f"Of one pair: E[z0 z1] = {found['covariance']:.2e}; "
        f"Cov(z0^2, z1^2) = {found['square_covariance']:.2e}.",
        "",
        f"Kolmogorov-Smirnov distance of r from Rayleigh {found['radius_ks']:.3e}, of u' from "
        f"uniform {found['angle_ks']:.3e}; therefore of z from the normal at most "
        f"{found['ks_bound']:.2e}: to see that at the 5% level takes about "
        f"{(1.358 / found['ks_bound']) ** 2:.0e} normals.",
        "",
        f"Cut-off: |z| <= {found['greatest_radius']:.6f}, from u = 2^-33; a true normal is beyond "
        f"it with probability {found['normal_mass_beyond']:.2e}. Before it, the tail P(z > t), all "
        "radius words with a continuous angle:",
        "",
        *table(("t", "P(z > t)", "relative to the normal"), tails),
    ]


def sample(found: dict) -> list[str]:
    orders, n = found["orders"], 1 << found["log2_count"]
    laws = [(name, f"{each['ks']:.2e}", f"{each['ks_p']:.3f}",
             f"{each['chi2']:.0f} / {each['chi2_bins']}", f"{each['chi2_p']:.3f}",
             f"{each['greatest']:.4f}", f"{each['worst_ulp']:.2f}")
            for name, each in orders.items()]  # fmt: skip
    tails = []
    for i, (t, _) in enumerate(orders["blocks"]["tails"]):
        expected = 2 * n * stats.norm.sf(t)
        seen = [each["tails"][i][1] for each in orders.values()]
        scores = [
            f" ({(k - expected) / expected**0.5:+.1f})" if expected > 25 else "" for k in seen
        ]
        tails.append(
            (t, f"{expected:.1f}", *(f"{k}{z}" for k, z in zip(seen, scores, strict=True)))
        )
    return [
        "## Normals",
        "",
        f"2^{found['log2_count']} normals in each order (below); the first "
        f"{found['equal_to_randn']:,} of `blocks` are bit for bit those of `fastgen.randn`. "
        f"The error is that of the whole chain u, u' -> z, the worst of the first "
        f"{orders['blocks']['checked']:,} normals.",
        "",
        *table(("order", "KS distance", "p", "chi-square / bins", "p", "greatest abs(z)",
                "worst ulp"), laws),
        "Normals beyond t on either side, with z-scores:",
        "",
        *table(("t", "expected", *orders), tails),
    ]  # fmt: skip


def correlation(found: dict) -> list[str]:
    rows = [(name, kind, each["pairs"], f"{each['max']:.2f}", f"{each['expected']:.2f}",
             f"{each['p']:.3f}", f"{each['rms']:.3f}")
            for name, kinds in found.items() if name != "elements"
            for kind, each in kinds.items()]  # fmt: skip
    return [
        "## Correlation",
        "",
        f"Pearson correlation over {found['elements']:,} elements (16 times as many along one "
        "sample), as z-scores: the largest of all pairs, beside the median that independence "
        "gives, and the root mean square, 1 for independence.",
        "",
        *table(("between", "of", "pairs", "max", "expected", "p of max", "rms"), rows),
    ]


def words(found: dict) -> list[str]:
    orders = {name: each for name, each in found.items() if isinstance(each, dict)}
    rows = [(name, each["repeats"], f"{each['repeats_z']:+.2f}", f"{each['all_bytes_p']:.3f}",
             f"{each['worst_place_p']:.3f}") for name, each in orders.items()]  # fmt: skip
    return [
        "## Raw words",
        "",
        f"{found['words']:,} words in each order: repeats within lots of 2^20 words (expected "
        f"{found['expected_repeats']:.0f}), chi-square of the bytes at the 16 places of a block.",
        "",
        *table(("order", "repeats", "z-score", "p, all bytes", "p of the worst place"), rows),
        "Orders: `blocks` counts the blocks of one sample; `samples`, `steps`, `streams`, `seeds` "
        "take one block of each of 256 in turn; `fresh seeds` is the first block of every seed.",
        "",
    ]


def battery(title: str, entries: list[dict], row, head: tuple[str, ...]) -> list[str]:
    if "absent" in entries[0]:
        return [f"## {title}", "", f"Not run: {entries[0]['absent']}.", ""]
    title = f"{title} {entries[0]['version']}"
    return [f"## {title}", "", *table(head, [row(entry) for entry in entries])]


def practrand(entries: list[dict]) -> list[str]:
    lines = battery(
        "PractRand", entries,
        lambda e: (e["order"], e["bits"], f"2^{e['log2_bytes']}", e["results"],
                   "; ".join(e["anomalies"]) or "none"),
        ("order", "bits", "bytes", "results", "listed"),
    )  # fmt: skip
    if "absent" in entries[0]:
        return lines
    checkpoints = sum(entry["log2_bytes"] - 25 for entry in entries)  # 2^26 bytes, 2^27 ...
    listed = sum(len(entry["anomalies"]) for entry in entries)
    return lines + [
        "RNG_test lists a result when it is rare enough for chance to list 0.1 a checkpoint: of "
        f"{checkpoints} checkpoints about {0.1 * checkpoints:.0f}, and here {listed}. "
        "A generator that fails is listed as FAIL. `steps` runs twice as far for its line at 2^32.",
        "",
    ]


def testu01(entries: list[dict]) -> list[str]:
    return battery(
        "TestU01", entries,
        lambda e: (e["battery"], e["order"], e["bits"], e["statistics"],
                   "all passed" if e["passed"] else "; ".join(e["anomalies"])),
        ("battery", "order", "bits", "statistics", "result"),
    )  # fmt: skip


def picture(found: dict, file: Path) -> None:
    figure, (density, radius, angle) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    counts = np.array(found["sample"]["histogram"], dtype=float).reshape(-1, 16).sum(1)
    middle = (np.arange(counts.size) + 0.5) / 16 - 8
    seen = counts > 0
    density.semilogy(middle, stats.norm.pdf(middle), color="0.7", lw=3, label="normal density")
    density.semilogy(middle[seen], counts[seen] / counts.sum() * 16, ".", ms=3, label="fastgen")
    density.set(title=f"{counts.sum():,.0f} normals", xlabel="z", ylim=(1e-11, 1))
    binades = np.arange(265) / 8 - 33
    for name in ("log", "radius"):
        radius.plot(binades, found["exact"][name]["curve"], lw=1, label=name)
    radius.set(title="worst error, every radius word", xlabel="log2 u", ylabel="ulp")
    turns = (np.arange(256) + 0.5) / 256
    for name in ("cos", "sin"):
        angle.plot(turns, found["exact"][name]["curve"], lw=1, label=name)
    angle.set(title="worst error, every angle word", xlabel="turn u'", ylabel="ulp")
    for axes in (density, radius, angle):
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def write(found: dict, file: Path) -> None:
    """``file``'s neighbours: the report (.md) and, with its two parts there, the picture (.png)."""
    parts = {name: part for name, part in globals().items() if name in found and callable(part)}
    drawn = "exact" in found and "sample" in found
    lines = [
        "# The quality of the noise",
        "",
        *(f"- {name.replace('_', ' ')}: {value}" for name, value in found["environment"].items()),
        f"- to repeat: `{COMMANDS}{' --quick' if found['quick'] else ''}` "
        "(with PractRand's RNG_test on PATH, TestU01 on CPATH and LIBRARY_PATH)",
        "",
    ]
    if drawn:
        picture(found, file.with_suffix(".png"))
        lines += [f"![Histogram and errors]({file.with_suffix('.png').name})", ""]
    for name, part in parts.items():
        lines += part(found[name])
    file.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")
