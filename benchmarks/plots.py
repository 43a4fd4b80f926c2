"""The plots of the report: images/s over batch size, and where the time of a step goes. Needs matplotlib."""

import os
import re
from collections import defaultdict

KERNELS_SHOWN = 12


def throughput(run, path):
    """Images per second over batch size, a panel for each image size. False, and no file, for fewer than two batches
    in every panel: there would be no lines."""
    entries = run.of("train step")
    sizes = sorted({e["image_size"] for e in entries})
    batches = {size: sorted({e["batch"] for e in entries if e["image_size"] == size}) for size in sizes}
    sizes = [size for size in sizes if len(batches[size]) > 1]
    if not sizes:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(sizes), figsize=(5.5 * len(sizes), 4.2), squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        for label, points in lines(run, size):
            style = {"linewidth": 2.5} if label.startswith("fused") else {"linewidth": 1.2}
            axis.plot(*zip(*points, strict=True), marker="o", label=label, **style)
        axis.set(title=f"{size}×{size}", xlabel="batch", xscale="log", yscale="log")
        axis.set_xticks(batches[size], [str(batch) for batch in batches[size]])
        axis.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("images per second")
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    figure.suptitle(f"One G + D update on {run.device}\n({run.date}, torch {run.torch})", fontsize=11)
    _save(figure, path)
    return True


def lines(run, image_size):
    """(label, [(batch, images/s)]) of each variant. On a CPU of those with several batches, beside eager as it ran in
    turn with them: other rows may be of a moment when the machine was slower."""
    for variant, entries in run.steps_by_batch(image_size).items():
        if run.on_gpu or len(entries) > 1:
            yield variant, [(e["batch"], e["images_per_sec"]) for e in entries]
            beside = [(e["batch"], e["eager_images_per_sec"]) for e in entries if e.get("eager_images_per_sec")]
            if beside:
                yield f"eager, in turn with {variant}", beside


def step_time(profile, path):
    """The microseconds of each kernel in a step, the longest first, a panel for each profiled step."""
    plt = _pyplot()
    rows = profile.profiles
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(10, 0.3 * (KERNELS_SHOWN + 4) * len(rows)), squeeze=False, sharex=True
    )
    for axis, row in zip(axes[:, 0], rows, strict=True):
        kernels = longest(row["kernel_us"])
        names, times = list(kernels)[::-1], list(kernels.values())[::-1]
        axis.barh(names, times, color="tab:blue")
        for i, time in enumerate(times):
            axis.text(time, i, f" {time:.0f}", va="center", fontsize=8)
        title = f"{row['variant']}, {row['image_size']}×{row['image_size']}, batch {row['batch']}: "
        axis.set_title(f"{title}{row['step_us']:.0f} µs a step, {row['launches']} kernels and copies", fontsize=10)
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel("µs a step")
    figure.suptitle(f"Where the time of a step goes on {profile.device} ({profile.date})", fontsize=11)
    _save(figure, path)
    return True


def longest(kernel_us):
    """Readable name → microseconds, the KERNELS_SHOWN longest first and then the sum of the rest."""
    merged = defaultdict(float)
    for name, microseconds in kernel_us.items():
        merged[readable(name)] += microseconds
    ordered = sorted(merged.items(), key=lambda item: -item[1])
    shown = dict(ordered[:KERNELS_SHOWN])
    rest = ordered[KERNELS_SHOWN:]
    if rest:
        shown[f"{len(rest)} others"] = sum(microseconds for _, microseconds in rest)
    return shown


def readable(kernel):
    """A kernel's name without return type, template arguments and parameters, at most 60 characters of it."""
    name = re.sub(r"^void |\(anonymous namespace\)::", "", kernel)
    name = re.split(r"[<(]", name, maxsplit=1)[0].split("::")[-1] or kernel
    return name if len(name) <= 60 else name[:57] + "..."


def _pyplot():
    os.environ["MPLBACKEND"] = "agg"  # its import fails where a notebook named one that this Python does not have
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
