"""What importing the package does, and what it does not do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import timm_ghn

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there() -> None:
    for name in timm_ghn.__all__:
        assert getattr(timm_ghn, name).__module__.startswith("timm_ghn."), name
    assert set(timm_ghn.__all__) <= set(dir(timm_ghn))
    with pytest.raises(AttributeError, match="module 'timm_ghn' has no attribute 'hub_config'"):
        timm_ghn.hub_config  # noqa: B018


@pytest.mark.slow
def test_importing_the_package_is_light() -> None:
    """So is the help of the commands; and what only they, training or a picture need does not come with predictions."""
    heavy = ["torch", "timm", "rich", "matplotlib", "pyarrow", "joblib", "timm_ghn.training", "timm_ghn.evaluation.zoo"]
    loaded = f"print([name for name in {heavy} if name in sys.modules])"
    assert python(f"import sys, timm_ghn; {loaded}") == "[]\n"
    assert python(f"import sys, timm, timm_ghn; timm_ghn.predict; {loaded}") == "['torch', 'timm']\n"
    printed = python(
        "import sys\nfrom timm_ghn.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    print('torch' in sys.modules, 'timm' in sys.modules)"
    )
    assert "write a model's predicted weights to files" in printed and printed.endswith("False False\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import timm, timm_ghn",
        "import timm_ghn, timm",
        "import timm_ghn\nfrom timm.models import create_model",
        "from timm_ghn import plugin",
        "from timm_ghn import predict",
        "import timm_ghn\nassert timm_ghn.list_ghns()\nimport timm",
    ],
)
def test_the_hook_is_there_in_any_order(imports: str) -> None:
    look = "print(len(timm.list_models('test_resnet.ghn2', pretrained=True)), len(sys.meta_path))"
    finders = python("import sys, timm; print(len(sys.meta_path))")
    found = python(f"{imports}\nimport sys, timm, timm_ghn\n{look}\ntimm_ghn.uninstall()\n{look}")
    assert found == f"1 {finders}0 {finders}"
