import base64
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from elastic import own_packages
from elastic.own_packages import PackageError, check_packages

ROOT = Path(own_packages.__file__).resolve().parent.parent


def run_check(path: list[Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run check_packages in a fresh interpreter with only these folders in front."""
    code = (
        # The tests' own environment may hold us as an editable installation, found from anywhere.
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path "
        "if not getattr(f, '__module__', '').startswith('__editable__')]; "
        "from elastic.own_packages import check_packages; print(check_packages())"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def install(site: Path, distribution: str, files: dict[str, str]) -> None:
    """Put files and their RECORD there, as pip does."""
    record = []
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
        record.append(f"{name},sha256={digest.rstrip(b'=').decode()},{len(text)}")
    info = site / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "RECORD").write_text("\n".join(record) + "\n")


def our_files() -> dict[str, str]:
    files = {f"{name}/__init__.py": "" for name in own_packages.PACKAGES}
    return files | {
        "elastic/own_packages.py": (ROOT / "elastic" / "own_packages.py").read_text(),
        "models/dit.py": "WIDTH = 8\n",
    }


def test_the_checkout_holds_all_four_packages() -> None:
    assert check_packages() == ROOT


def test_a_folder_of_that_name_on_the_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    done = run_check([tmp_path, ROOT], tmp_path)
    assert done.returncode == 1
    assert f"package 'models' comes from {tmp_path / 'models'}" in done.stderr
    assert f"take {tmp_path} off PYTHONPATH" in done.stderr


def test_an_installation_that_is_whole_passes(tmp_path: Path) -> None:
    install(tmp_path, "restage", our_files())
    done = run_check([tmp_path], tmp_path.parent)
    assert done.stdout.strip() == str(tmp_path), done.stderr


def test_a_distribution_that_wrote_over_ours_is_named(tmp_path: Path) -> None:
    install(tmp_path, "restage", our_files())
    install(tmp_path, "intruder", {"models/dit.py": "WIDTH = 9\n"})
    done = run_check([tmp_path], tmp_path.parent)
    assert done.returncode == 1
    assert "models/dit.py is not the file that restage installed" in done.stderr
    assert "was written by intruder" in done.stderr


def test_a_package_that_is_gone_is_named(tmp_path: Path) -> None:
    install(tmp_path, "restage", {k: v for k, v in our_files().items() if "stages/" not in k})
    done = run_check([tmp_path], tmp_path.parent)
    assert "package 'stages' comes from nowhere" in done.stderr


def test_the_start_up_check_imports_nothing_heavy() -> None:
    code = (
        "import sys; from elastic.own_packages import check_packages; check_packages(); "
        "print([n for n in ('torch', 'av', 'aim', 'ray', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_error_is_one_that_a_start_can_report() -> None:
    assert issubclass(PackageError, ImportError)
