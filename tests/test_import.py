"""What importing fastgan needs, and what it must not."""

import subprocess
import sys

WITHOUT = """
import importlib.util, sys

missing = {missing!r}
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in missing else find_spec(name, *rest)

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import torch, fastgan
from fastgan.training import TrainStep

networks = fastgan.models.Generator(image_size=8, ngf=2), fastgan.models.Discriminator(image_size=8, ndf=2)
print(TrainStep(*networks, latent_dim=100)(torch.rand(2, 3, 8, 8))["loss_d"].isfinite().item())
"""


def test_trains_on_a_cpu_with_torch_and_numpy_alone():
    missing = ("triton", "torchvision", "PIL", "mlxtend", "tqdm", "tensorboard", "matplotlib")
    done = subprocess.run([sys.executable, "-c", WITHOUT.format(missing=missing)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "True"


FORWARD = """
import sys
import torch, fastgan

model = fastgan.fuse(fastgan.models.Discriminator(image_size=8, ndf=2))
model(torch.rand(2, 3, 8, 8)).sum().backward()
print("torch._dynamo" in sys.modules)
"""


def test_nothing_imports_dynamo_before_it_compiles():
    """It takes as long as torch itself."""
    done = subprocess.run([sys.executable, "-c", FORWARD], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def test_no_top_level_module_named_kernels(tmp_path):
    code = "import importlib.util as u, fastgan.kernels; print(u.find_spec('kernels'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "None", done.stdout + done.stderr
