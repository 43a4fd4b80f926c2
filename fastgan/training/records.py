"""What a run leaves behind while it trains: metrics.jsonl, TensorBoard events, sample pictures."""

import itertools
import json
import shutil
import sys
import time
import warnings
from contextlib import ExitStack

from fastgan.checks import first_few, is_integer, require
from fastgan.command_line import say
from fastgan.files import write_text
from fastgan.training.devices import peak_memory_mb, synchronize
from fastgan.training.samples import grid, sample, save_png

METRICS, PICTURES = "metrics.jsonl", "samples"
_LOSSES = ("loss_d", "loss_g", "d_real", "d_fake")


def check_packages():
    """Raise ValueError, naming the package, unless everything that records and plots need can be imported."""
    for module in ("PIL", "matplotlib", "tensorboard", "tqdm"):
        require(module, "training")


def read_metrics(path, up_to_step=None):
    """The rows of a metrics.jsonl, up to a step; no file is no rows. Lines that are no rows are left out."""
    rows, _ = _read_rows(path)
    return [row for row in rows if up_to_step is None or row["step"] <= up_to_step]


def _read_rows(path):
    """(rows, numbers of the lines that are none; the last line may have been cut short and is not counted)."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows, broken = [], []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and is_integer(row.get("step")) and all(_is_loss(row.get(name)) for name in _LOSSES):
            rows.append(row)
        elif number < len(lines):
            broken.append(number)
    return rows, broken


def _is_loss(value):
    """Whether it is a number that a float can be, also one that is not finite."""
    return isinstance(value, float) or (is_integer(value) and abs(value) <= sys.float_info.max)


def _keep_damaged(path):
    """Copy a metrics.jsonl that has lines that are no rows to a name of its own, before it is written anew."""
    _, broken = _read_rows(path)
    if broken:
        names = (path.with_name(f"metrics-damaged-{i}.jsonl") for i in itertools.count(1))
        kept = next(name for name in names if not name.exists())
        shutil.copyfile(path, kept)
        warnings.warn(f"{path} has lines that are no rows ({first_few(broken)}); it is kept as {kept}", stacklevel=3)


class Records:
    """The records of a ``Run``, as a context manager around its loop; ``images`` is what feeds its steps."""

    def __init__(self, run, images):
        self.run, self.images = run, images
        self.pictures = run.out / PICTURES

    def __enter__(self):
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        run = self.run
        self.pictures.mkdir(exist_ok=True)
        _keep_damaged(run.out / METRICS)
        # Rows after the checkpoint are of steps that are about to be done again.
        rows = read_metrics(run.out / METRICS, run.first_step)
        write_text(run.out / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
        with ExitStack() as opened:
            self.metrics = opened.enter_context(open(run.out / METRICS, "a"))
            self.board = opened.enter_context(SummaryWriter(run.out, purge_step=run.first_step + 1))
            bar = tqdm(
                desc=run.config.dataset,
                total=run.last_step * run.config.batch_size,
                initial=run.first_step * run.config.batch_size,
                unit=" images",
                unit_scale=True,
                ncols=shutil.get_terminal_size().columns,  # 80 where the terminal does not tell
                disable=None if sys.stderr else True,  # on a terminal only; elsewhere each save prints a line
            )
            self.bar = opened.enter_context(bar)
            self._opened = opened.pop_all()
        self.restart_clock()
        return self

    def __exit__(self, *exception):
        self._opened.close()

    def restart_clock(self):
        """Measure images per second from here."""
        self.clock, self.images_since = time.perf_counter(), 0

    def advance(self):
        """One more step is done."""
        self.images_since += self.run.config.batch_size
        self.bar.update(self.run.config.batch_size)

    def log(self, step, losses):
        """Write one row: ``losses`` are the TrainStep's of this step. This is where the loop waits for the GPU."""
        run = self.run
        losses = {name: value.item() for name, value in losses.items()}
        synchronize(run.device)
        row = {
            "step": step,
            "epoch": (step - 1) // run.steps_per_epoch + 1,
            "images": step * run.config.batch_size,
            **losses,
            "images_per_sec": round(self.images_since / (time.perf_counter() - self.clock), 1),
            "data_wait_ms": round(1000 * self.images.seconds_waited() * run.config.batch_size / self.images_since, 3),
            "peak_memory_mb": peak_memory_mb(run.device),
        }
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()
        for name in row.keys() - {"step"}:
            if row[name] is not None:
                self.board.add_scalar(name, row[name], step)
        self.bar.set_postfix_str(
            f"step {step}, loss D {row['loss_d']:.3f}, G {row['loss_g']:.3f}, data wait {row['data_wait_ms']:.1f} ms"
        )
        self.last_row = row
        self.restart_clock()

    def draw(self, step):
        """Write the sample picture of this step, and say how far the run is where there is no progress bar."""
        picture = grid(sample(self.run.step.generator, self.run.fixed_latent))
        save_png(picture, self.pictures / f"step-{step:06d}.png")
        self.board.add_image("samples", picture, step)
        if self.bar.disable:
            row = self.last_row
            say(
                f"step {step}/{self.run.last_step}, epoch {row['epoch']}: loss D {row['loss_d']:.3f}, "
                f"G {row['loss_g']:.3f}, {row['images_per_sec']:.0f} images/s, data wait {row['data_wait_ms']:.1f} ms"
            )
