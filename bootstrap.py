#!/usr/bin/env python3
"""Sets up .venv when it is needed, then runs one of the project's commands. Standard library only, any OS.

    python bootstrap.py setup       make or mend .venv, nothing else
    python bootstrap.py lab         open JupyterLab on the first notebook
    python bootstrap.py run         execute the notebooks, write copies and HTML pages to artifacts/run/
    python bootstrap.py test        everything that CI runs
    python bootstrap.py bench       measure on this machine, side by side, and print ratios
    python bootstrap.py notebooks   execute the notebooks and save their outputs into the files

Arguments after the command are passed on to it. UPCYCLING_TORCH=cpu|cuda|default chooses the build of torch.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENV = ROOT / ".venv"
PYTHON = ENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = ENV / "setup.json"  # what was installed; written last, so that it exists only after a complete set-up
UNFINISHED = ENV / "setup-unfinished"  # exists while packages are being installed
OLDEST, NEWEST = (3, 11), (3, 14)  # what the pins of requirements.txt can be installed on
TORCH_CHOICES = ("cpu", "cuda", "default")
TORCH_INDEX = "https://download.pytorch.org/whl/"
GIGABYTES_NEEDED = {"cpu": 3, "default": 3, "cuda": 10}

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "msedge",
    "microsoft-edge",
)
BROWSER_FILES = (  # where they lie without being on the PATH
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)

COMMANDS = {  # name -> arguments of the environment's Python
    "setup": None,
    "lab": ["-m", "jupyterlab", str(ROOT / "notebooks" / "00_start_here.ipynb")],
    "run": [str(ROOT / "tools" / "run_notebooks.py")],
    "test": [str(ROOT / "tools" / "run_tests.py")],
    "bench": ["-m", "upcycling", "bench"],
    "notebooks": [str(ROOT / "tools" / "run_notebooks.py"), "--save"],
}


class SetupError(Exception):
    """Its message is the one sentence that the user reads."""


def child_environment(environment):
    """The environment variables for everything that is started from here."""
    result = dict(environment)
    # pip is told not to compile: a module is compiled when first imported, which this variable would prevent for ever
    result.pop("PYTHONDONTWRITEBYTECODE", None)
    result.pop("PYTHONHOME", None)
    result.pop("PYTHONPATH", None)
    # one thread: the same numbers everywhere, and no stall on a busy machine
    result.setdefault("OMP_NUM_THREADS", "1")
    if result.get("PIP_FIND_LINKS"):  # uv does not read pip's settings
        result.setdefault("UV_FIND_LINKS", result["PIP_FIND_LINKS"])
    return result


def check_python(version=sys.version_info, executable=sys.executable):
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        raise SetupError(
            "Python {}.{} to {}.{} is needed, {} is {}.{}; run this with another one, as in `python3.12 bootstrap.py` "
            "or `make PYTHON=python3.12`".format(*OLDEST, *NEWEST, executable, *version[:2])
        )


def torch_choice(environment):
    """UPCYCLING_TORCH, or None when the user leaves the choice to us."""
    choice = environment.get("UPCYCLING_TORCH") or None
    if choice is not None and choice not in TORCH_CHOICES:
        raise SetupError("UPCYCLING_TORCH={} is none of {}".format(choice, ", ".join(TORCH_CHOICES)))
    return choice


def wanted_stamp():
    """What a complete set-up of these files on this Python looks like, without the build of torch."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    dependencies = [project["build-system"], project["project"]["dependencies"]]
    dependencies += [project["project"]["optional-dependencies"], project["tool"]["setuptools"]]
    text = json.dumps(dependencies, sort_keys=True) + (ROOT / "requirements.txt").read_text(encoding="utf-8")
    return {
        "packages": hashlib.sha256(text.encode("utf-8")).hexdigest()[:16],
        "python": "{}.{}".format(*sys.version_info[:2]),
        "root": str(ROOT),  # a moved folder needs its links to itself renewed
    }


def read_stamp():
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_set_up(stamp, wanted, choice):
    """True when nothing has to be installed. An unset UPCYCLING_TORCH accepts whatever was chosen before."""
    same = all(stamp.get(key) == value for key, value in wanted.items())
    return same and choice in (None, stamp.get("torch"), stamp.get("asked")) and PYTHON.exists()


def has_nvidia_gpu():
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        finished = subprocess.run([program, "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return finished.returncode == 0 and b"GPU" in finished.stdout


def choose_torch(choice, platform, has_gpu, has_find_links):
    """(kind, index, reason): which build of torch, from which index of pytorch.org (None: the usual one).

    The usual index has, under one version number, CUDA builds for Linux and CPU builds for macOS and Windows.
    """
    if choice is None and platform.startswith("linux") and not has_gpu and has_find_links:
        return "default", None, "pip's own settings name a place for wheels"
    if choice is not None:
        kind, reason = choice, "UPCYCLING_TORCH=" + choice
    elif platform == "darwin":
        kind, reason = "default", "macOS has one build"
    elif has_gpu:
        kind, reason = "cuda", "nvidia-smi lists a GPU"
    else:
        kind, reason = "cpu", "no NVIDIA GPU was found"
    if kind == "cpu" and platform.startswith("linux"):
        return kind, "cpu", reason
    if kind == "cuda" and platform == "win32":
        return kind, "cu130", reason
    return kind, None, reason


def make_venv(uv):
    """A virtual environment with this Python; an unusable or half-made one is replaced."""
    import venv

    usable = PYTHON.exists() and not UNFINISHED.exists()
    if usable:
        probe = "import sys{}; print('%d.%d' % sys.version_info[:2])".format("" if uv else ", pip")
        finished = subprocess.run([str(PYTHON), "-c", probe], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        usable = finished.stdout.decode().strip() == "{}.{}".format(*sys.version_info[:2])
    if usable:
        return
    if not uv:
        try:
            import ensurepip  # noqa: F401
        except ImportError:
            raise SetupError(
                "this Python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"
            ) from None
    print(f"making .venv with Python {sys.version.split()[0]}", flush=True)
    try:
        venv.create(ENV, clear=ENV.exists(), with_pip=not uv)
    except subprocess.CalledProcessError as error:
        raise SetupError(
            f"pip could not be put into .venv ({error}); on Debian and Ubuntu: apt-get install python3-venv"
        ) from None


def explain(output, packages):
    """One sentence for a failed installation, from what the installer printed."""
    text = output.lower()
    if "no space left" in text or "not enough space" in text:
        return "the disk is full; free some space and run the same command again"
    signs = ("name resolution", "connection", "max retries", "timed out", "unreachable", "getaddrinfo", "dns error")
    if any(sign in text for sign in signs):
        return f"{packages} could not be downloaded; go online once and run the same command again"
    if "no matching distribution" in text or "no solution found" in text:
        lines = [line for line in output.splitlines() if "no matching distribution" in line.lower()] or [packages]
        return f"no file for this computer: {lines[-1].strip()}"
    return f"{packages} could not be installed; the installer's last lines are above"


def install(installer, arguments):
    """(succeeded, output) of the installer, with one line of progress while it works."""
    command = [str(part) for part in [*installer, *arguments]]
    process = subprocess.Popen(
        command, cwd=ROOT, env=child_environment(os.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines, count, live = [], 0, sys.stdout.isatty()
    for raw in process.stdout:
        line = raw.decode(errors="replace").rstrip()
        lines.append(line)
        if line.startswith(("Collecting ", "Installing collected")):
            count += 1
            word = "copying files" if line.startswith("Installing") else line.split()[1]
            if live:
                print(f"\r\x1b[K  {count} {word}", end="", flush=True)
            elif count % 25 == 0 or line.startswith("Installing"):
                print(f"  {count} {word}", flush=True)
    if live and count:
        print("\r\x1b[K", end="")
    return process.wait() == 0, "\n".join(lines)


def must_install(installer, arguments, packages):
    succeeded, output = install(installer, arguments)
    if not succeeded:
        if "Installing collected" not in output and "Prepared " not in output:
            UNFINISHED.unlink()  # pip or uv failed before it touched a file: what is there can stay
        print("\n".join(output.splitlines()[-15:]), file=sys.stderr)
        raise SetupError(explain(output, packages))


def torch_pin():
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("torch=="):
            return line.split(";")[0].split("==")[1].strip()
    raise SetupError("requirements.txt pins no torch")


def set_up():
    """Makes .venv what requirements.txt and pyproject.toml say; returns at once when it is that already."""
    check_python()
    choice = torch_choice(os.environ)
    wanted = wanted_stamp()
    stamp = read_stamp()
    if is_set_up(stamp, wanted, choice):
        return False
    started = time.time()
    uv = shutil.which("uv")
    make_venv(uv)
    UNFINISHED.touch()
    if STAMP.exists():
        STAMP.unlink()

    if uv:
        installer = [uv, "pip", "install", "--python", PYTHON]
        settings = child_environment(os.environ).get("UV_FIND_LINKS", "")
    else:
        installer = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
        listing = [str(PYTHON), "-m", "pip", "config", "list"]
        settings = subprocess.run(listing, stdout=subprocess.PIPE, env=child_environment(os.environ)).stdout.decode()
        settings = "find-links" if "find-links" in settings else ""
    asked = choice or stamp.get("asked")  # an earlier wish holds until there is a new one
    kind, index, reason = choose_torch(asked, sys.platform, has_nvidia_gpu(), bool(settings))
    print("torch: {} build ({})".format({"default": "the usual"}.get(kind, kind.upper()), reason), flush=True)
    installed = list(ENV.glob("[Ll]ib*/**/site-packages/torch"))
    free = shutil.disk_usage(str(ENV)).free / 1e9
    if not installed and free < GIGABYTES_NEEDED[kind]:
        UNFINISHED.unlink()
        raise SetupError(f"about {GIGABYTES_NEEDED[kind]} GB of disk are needed, {free:.1f} GB are free in {ROOT}")

    version = torch_pin()
    print("installing the packages of requirements.txt into .venv; minutes the first time", flush=True)
    if index is not None:
        # Alone and first, from an index that has nothing else that is wanted; what it needs comes with the rest.
        wheel = f"torch=={version}+{index}"
        patience = [] if uv else ["--retries", "1", "--timeout", "20"]
        arguments = ["--no-deps", "--index-url", TORCH_INDEX + index, *patience, wheel]
        if not install(installer, arguments)[0]:
            print(f"{TORCH_INDEX}{index} does not answer or lacks {wheel}; taking the usual build")
            kind = "default"
    elif kind == "cuda" and sys.platform.startswith("linux"):
        # `===` compares text: 2.13.0 itself and not the 2.13.0+cpu of a local folder or of an earlier set-up
        must_install(installer, ["--no-deps", "torch===" + version], "torch " + version)
    must_install(installer, ["-r", ROOT / "requirements.txt"], "the packages of requirements.txt")
    must_install(installer, ["--no-deps", "--no-build-isolation", "-e", ROOT], "this project's library")

    check = "import torch, upcycling; print('torch', torch.__version__)"
    finished = subprocess.run(
        [str(PYTHON), "-c", check], env=child_environment(os.environ), stdout=subprocess.PIPE, cwd=str(ENV)
    )
    if finished.returncode != 0:
        raise SetupError("the packages are installed but `import torch, upcycling` fails; remove .venv and try again")
    handle, name = tempfile.mkstemp(dir=str(ENV))
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(dict(wanted, torch=kind, asked=asked), file)
    os.replace(name, str(STAMP))
    UNFINISHED.unlink()
    print(f"ready after {time.time() - started:.0f} s: {finished.stdout.decode().strip()}", flush=True)
    return True


def runs(browser):
    """False for what only stands in for a browser, such as Ubuntu's chromium before its snap is there."""
    if os.name == "nt":  # there, asking for the version opens a window
        return True
    try:
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)
        return subprocess.run([browser, "--version"], **quiet).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def find_browser(environment):
    """Path of a browser that the tests can drive: CHROMIUM's, an installed one or playwright's own; None if none."""
    wanted = environment.get("CHROMIUM")
    if wanted:
        if not Path(wanted).exists():
            raise SetupError(f"CHROMIUM={wanted} does not exist; give the path of a Chromium, or unset it")
        return wanted
    paths = [path for path in map(shutil.which, BROWSERS) if path] + [
        path for path in BROWSER_FILES if Path(path).exists()
    ]
    probe = "from playwright.sync_api import sync_playwright as s\nwith s() as p: print(p.chromium.executable_path)"
    python = str(PYTHON) if PYTHON.exists() else sys.executable  # conda's, when the tests ask
    finished = subprocess.run([python, "-c", probe], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    own = finished.stdout.decode().strip()
    paths += [own] if own and Path(own).exists() else []
    return next(filter(runs, paths), None)


def browser_installers():
    """(what is tried, its commands) for this machine, in order."""
    result = []
    if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        packages = ["chromium", "fonts-liberation"]
        install = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
        result.append(("apt-get install chromium", [["apt-get", "update"], install]))
    result.append(("playwright install chromium", [[str(PYTHON), "-m", "playwright", "install", "chromium"]]))
    return result


def prepare_browser():
    """The path of a browser for the tests, installed where that can be done; None, with the reason printed, if not."""
    browser = find_browser(os.environ)
    failures = []
    for name, commands in [] if browser else browser_installers():
        print(f"no browser for the browser tests; trying {name}", flush=True)
        environment = dict(child_environment(os.environ), DEBIAN_FRONTEND="noninteractive")
        output = ""
        try:
            for command in commands:
                finished = subprocess.run(
                    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900
                )
                output = finished.stdout.decode(errors="replace").strip() or f"exit status {finished.returncode}"
        except (OSError, subprocess.TimeoutExpired) as error:
            output = str(error)
        browser = find_browser(os.environ)
        if browser:
            break
        failures.append(f"{name}: {output.splitlines()[-1]}")
    if not browser:
        print(
            "the browser tests (lib/tests/test_browser.py) will be skipped: no Chromium, Chrome or Edge was found and "
            f"none could be installed ({'; '.join(failures)}). CHROMIUM=path names one.",
            flush=True,
        )
    return browser


def main(arguments):
    if not arguments or arguments[0] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        return 2
    name, rest = arguments[0], arguments[1:]
    try:
        set_up()
    except (SetupError, OSError) as error:
        print(f"set-up stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    if name == "setup":
        print(f"{ENV} is ready")
        return 0
    if name == "lab" and hasattr(os, "geteuid") and os.geteuid() == 0:
        rest = ["--allow-root", *rest]
    command = [str(PYTHON), *COMMANDS[name], *rest]
    environment = child_environment(os.environ)
    try:
        if name == "test" and not {"lint", "notebooks"} & set(rest):
            environment["CHROMIUM"] = prepare_browser() or ""
        return subprocess.call(command, env=environment)
    except SetupError as error:
        print(f"set-up stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the command got it too and has said so
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
