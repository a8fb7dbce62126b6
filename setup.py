"""Builds the native modules with ninja, against the torch that is already installed.

The modules use LibTorch's stable ABI: one build runs with every torch >= 2.10, so it does not
matter that pip builds in an isolated environment. There the installed torch is found where the
environment, the installation below it or the user has packages; only where there is none does the
build ask for one.

    CXX                    the compiler's command            (default: c++, then g++, clang++)
    FASTLSTM_CCACHE        0: do not use ccache or sccache   (default: where one is on PATH)
    MAX_JOBS               how many compilers run at once    (default: by cores and memory)
    FASTLSTM_CUDA          auto: the CUDA kernels where torch has CUDA and nvcc is found, and one
                           line that says why not elsewhere; 0: never; 1: or an error
    CUDA_HOME              the CUDA toolkit        (default: nvcc on PATH, then /usr/local/cuda)
    TORCH_CUDA_ARCH_LIST   GPUs to compile for     (default: 7.5;8.0;9.0a;10.0a+PTX)
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = [2, 10]
STABLE_ABI = "0x020a000000000000"  # that one's
BYTES_PER_JOB = 1 << 30

CUDA_ARCHITECTURES = "7.5;8.0;9.0a;10.0a+PTX"

# Flags of the files in csrc/cpu/isa/<name>, on x86-64. Other processors build only the baseline,
# which the compiler vectorises for what they have.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
AVX512.append("-mprefer-vector-width=512")
INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512dot": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
YOUNG = ["avx512dot", "amx"]  # left out where the compiler does not know them (GCC 9, GCC 10)


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def package_folders() -> list[str]:
    """Where this Python's packages are. An isolated build has few of these folders in sys.path."""
    paths = sysconfig.get_paths()
    folders = [*sys.path, paths["purelib"], paths["platlib"], *site.getsitepackages()]
    if sys.base_prefix in site.PREFIXES:  # an environment that is closed to them lacks it
        folders.append(site.getusersitepackages())
    return folders


def find_torch() -> Path | None:
    """The folder of the installed torch, if it is new enough."""
    for folder in package_folders():
        torch = Path(folder or ".") / "torch"
        if (torch / "include" / "torch" / "csrc" / "stable").is_dir():
            version = [int(part) for part in re.findall(r"\d+", torch_version(torch))[:2]]
            if version >= OLDEST_TORCH:
                return torch.resolve()
    return None


def torch_version(torch: Path) -> str:
    found = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())
    return found.group(1) if found else "unknown"


def find_cuda() -> Path | None:
    """The CUDA toolkit's folder. nvcc on PATH may be a wrapper elsewhere: nvcc itself knows."""
    nvcc = shutil.which("nvcc")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if root := os.environ.get(name):
            nvcc = str(Path(root) / "bin" / "nvcc")
            break
    if nvcc is None or not Path(nvcc).exists():
        nvcc = "/usr/local/cuda/bin/nvcc"
    try:
        command = [nvcc, "--dryrun", "-c", "none.cu"]
        said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stderr
    except OSError:
        return None
    found = re.search(r"^#\$ TOP=(.+)$", said, re.M)
    return Path(found.group(1)).resolve() if found else None


def why_no_cuda(torch: Path | None) -> str:
    """One line on why the CUDA kernels are not built; empty where they are."""
    asked = os.environ.get("FASTLSTM_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        raise SystemExit(f"fastlstm: FASTLSTM_CUDA: expected auto, 0 or 1, got {asked!r}")
    if asked == "0":
        return "FASTLSTM_CUDA=0"
    why = ""
    if torch is None or not any((torch / "lib").glob("*torch_cuda.*")):
        why = "the installed torch is built without CUDA"
    elif find_cuda() is None:
        why = "no CUDA toolkit: nvcc is neither in CUDA_HOME, on PATH nor in /usr/local/cuda"
    if why and asked == "1":
        raise SystemExit(f"fastlstm: FASTLSTM_CUDA=1, but {why}")
    return why


def cuda_architectures() -> str:
    names = re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    return ";".join(names) or CUDA_ARCHITECTURES


def cuda_targets() -> list[str]:
    """nvcc's flags for the architectures. PTX is that of the plain number, for newer GPUs."""
    flags = []
    for name in cuda_architectures().split(";"):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if found is None:
            raise SystemExit(
                f"fastlstm: TORCH_CUDA_ARCH_LIST: expected numbers such as 9.0a, got {name!r}"
            )
        arch = found[1] + found[2] + found[3]
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        if found[4]:
            plain = found[1] + found[2]
            flags += ["-gencode", f"arch=compute_{plain},code=compute_{plain}"]
    return flags


def find_ninja() -> str:
    """The package's, which pip's isolated builds have too, then the system's.

    Another version does not read the log of a former build, and compiles everything again.
    """
    with contextlib.suppress(ImportError):
        import ninja

        if path := shutil.which("ninja", path=ninja.BIN_DIR):
            return path
    path = shutil.which("ninja")
    if path is None:
        raise SystemExit("fastlstm: building needs `ninja`, which was not found")
    return path


def find_compiler() -> str:
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    if asked:
        raise SystemExit(f"fastlstm: CXX: expected a compiler's command, got {asked!r}, not found")
    raise SystemExit("fastlstm: building needs a C++17 compiler (g++ or clang++), none was found")


def understands(compiler: str, flags: list[str]) -> bool:
    command = [*shlex.split(compiler), *flags, "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input="", capture_output=True, text=True).returncode == 0


def is_cache(word: str) -> bool:
    return Path(word).name in ("ccache", "sccache")


def compiler_cache(command: list[str]) -> str:
    """ccache or sccache as a prefix of a compiler's command; empty where it begins with one."""
    if os.environ.get("FASTLSTM_CCACHE") == "0" or is_cache(command[0]):
        return ""
    found = shutil.which("ccache") or shutil.which("sccache")
    return f"{shlex.quote(found)} " if found else ""


def pybind11_include(torch: Path) -> Path:
    """pybind11's own headers or, on a machine without the package, the copy inside torch."""
    try:
        import pybind11
    except ImportError:
        return torch / "include"
    return Path(pybind11.get_include())


def jobs() -> int:
    if asked := os.environ.get("MAX_JOBS"):
        if not asked.isdecimal():
            raise SystemExit(f"fastlstm: MAX_JOBS: expected a number, got {asked!r}")
        return max(1, int(asked))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(os.cpu_count() or 1, memory // BYTES_PER_JOB))


def init_function(ext: Extension) -> str:
    """The one symbol that a module exports: others would meet those of other libraries."""
    return f"PyInit_{ext.name.split('.')[-1]}"


def unit_flags(compiler: str, torch: Path) -> dict[str, list[str]]:
    """What some units need besides, by the first word of their names.

    ``ops`` see torch's headers, ``module`` pybind11's, none sees both: torch's own copy of
    pybind11 refuses a unit that keeps to the stable ABI. The kernels see neither.
    """

    def system(*folders: Path | str) -> list[str]:  # headers that are not ours to warn about
        return [word for folder in folders for word in ("-isystem", str(folder))]

    words = [*shlex.split(compiler), "--version"]
    version = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
    build_info = [
        f'-DFASTLSTM_COMPILER="{version[0] if version else compiler}"',
        f'-DFASTLSTM_TORCH_VERSION="{torch_version(torch)}"',
    ]
    return {
        "ops": [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", *system(torch / "include")],
        "module": build_info + system(pybind11_include(torch), sysconfig.get_paths()["include"]),
    }


def quote(words: list[str]) -> str:
    return " ".join(shlex.quote(word) for word in words).replace("$", "$$")


def ninja_path(path: Path | str) -> str:
    return re.sub(r"([ :$])", r"$\1", str(path))


def ninja_file(ext: Extension, torch: Path, target: Path) -> str:
    """The build of a module against a torch, for ninja in a folder that holds ``exports.map``."""
    compiler = find_compiler()
    young = YOUNG if is_x86() else []
    unknown = [isa for isa in young if not understands(compiler, INSTRUCTION_SETS[isa])]
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags += ["-ffp-contract=fast", f"-I{ROOT / 'csrc'}", f"-ffile-prefix-map={ROOT}/="]
    flags += [f"-DFASTLSTM_NO_{isa.upper()}" for isa in unknown]
    link = ["-shared", "-Wl,--version-script=exports.map"]
    if sys.platform == "darwin":
        link = ["-bundle", "-undefined", "dynamic_lookup"]
        link += [f"-Wl,-exported_symbol,_{init_function(ext)}"]
    link += [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    cache = compiler_cache(shlex.split(compiler))
    lines = [
        f"cxx = {compiler}",
        f"flags = {quote(flags)}",
        f"link = {quote(link)}",
        "rule compile",
        f"  command = {cache}$cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        "  command = $cxx $in $link -o $out",
        "  description = link $out",
    ]
    more = unit_flags(compiler, torch)
    if any(source.endswith(".cu") for source in ext.sources):
        lines += cuda_lines(compiler)
    objects = []
    for source in ext.sources:
        path = Path(source)
        isa = path.parent.name
        if isa in unknown:
            continue
        rule = "nvcc" if source.endswith(".cu") else "compile"
        objects.append(ninja_path(path.relative_to("csrc").with_suffix(".o")))
        lines.append(f"build {objects[-1]}: {rule} {ninja_path(ROOT / source)}")
        kind = path.stem.split("_")[0]
        if words := INSTRUCTION_SETS.get(isa) or more.get(kind, []):
            lines.append(f"  more = {quote(words)}")
    lines.append(f"build {ninja_path(target)}: link {' '.join(objects)} | exports.map")
    return "\n".join(lines) + "\n"


def cuda_lines(compiler: str) -> list[str]:
    """What the CUDA module needs besides: nvcc's rule, CUDA's runtime linked statically."""
    root = find_cuda()
    assert root is not None  # why_no_cuda said so
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}"]
    flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    host = next(word for word in shlex.split(compiler) if not is_cache(word))
    flags += ["-ccbin", host, *cuda_targets()]
    targets = f'-DFASTLSTM_CUDA_TARGETS="{cuda_architectures()}"'
    target = {"aarch64": "sbsa"}.get(platform.machine(), platform.machine())  # CUDA's name
    folders = ("lib64", "lib", f"targets/{target}-linux/lib")
    libraries = [f"-L{root / folder}" for folder in folders]
    libraries += ["-ltorch_cuda", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    include = quote(["-DUSE_CUDA", targets, "-isystem", str(root / "include")])
    return [
        f"nvcc = {shlex.quote(str(root / 'bin' / 'nvcc'))} {quote(flags)}",
        f"flags = $flags {include}",
        f"link = $link {quote(libraries)}",
        "rule nvcc",
        f"  command = {compiler_cache(['nvcc'])}$nvcc -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
    ]


def build_module(ext: Extension, torch: Path, work: Path, target: Path) -> None:
    """Compile an extension against a torch in the folder ``work`` and link it as ``target``."""
    work.mkdir(parents=True, exist_ok=True)
    exports = work / "exports.map"
    if not exports.exists():  # a newer one would link again
        exports.write_text(f"{{ global: {init_function(ext)}; local: *; }};\n")
    (work / "build.ninja").write_text(ninja_file(ext, torch, target))
    verbose = ["-v"] if os.environ.get("VERBOSE") else []
    command = [find_ninja(), "-C", str(work), "-j", str(jobs()), *verbose]
    if subprocess.run(command).returncode != 0:
        raise SystemExit("fastlstm: the native build failed (messages above)")


class NinjaBuild(build_ext):
    """Compiles every extension's sources with one ninja file."""

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit(
                "fastlstm: building needs torch >= 2.10; install torch first (pip install torch)"
            )
        # Absolute, for ninja runs in the build folder; kept between builds, so that a rebuild
        # compiles only what changed.
        work = Path(self.build_temp).resolve() / ext.name
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build_module(ext, torch, work, target)
        # Python run in the repository's root imports the package from there, not the installed
        # one: leave the module beside the sources too.
        beside = ROOT.joinpath(*ext.name.split(".")[:-1]) / target.name
        if beside != target:
            shutil.copy2(target, str(beside) + ".tmp")
            os.replace(str(beside) + ".tmp", beside)


def cpu_sources() -> list[str]:
    shared = [
        "module.cpp",
        "ops_cpu.cpp",
        "ops_generate.cpp",
        "ops_packed.cpp",
        "scratch.cpp",
        "cuda/planner.cpp",
        "cuda/generate_plan.cpp",
    ]
    kernels = sorted((ROOT / "csrc" / "cpu").rglob("*.cpp"))
    return [f"csrc/{name}" for name in shared] + [
        str(path.relative_to(ROOT))
        for path in kernels
        if is_x86() or path.parent.name not in INSTRUCTION_SETS
    ]


def cuda_sources() -> list[str]:
    files = [path for path in (ROOT / "csrc" / "cuda").rglob("*.c*") if path.suffix != ".cuh"]
    return [
        "csrc/ops_cuda.cpp",
        "csrc/ops_generate_cuda.cpp",
        *sorted(path.relative_to(ROOT).as_posix() for path in files),
    ]


def extensions() -> list[Extension]:
    modules = [Extension("fastlstm._C", cpu_sources())]
    if why := why_no_cuda(find_torch()):
        print(f"fastlstm: CUDA kernels are not built: {why}", file=sys.stderr)
    else:
        modules.append(Extension("fastlstm._C_cuda", cuda_sources()))
    return modules


if __name__ == "__main__":  # the tests import this file
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": NinjaBuild},
        # setuptools hands these to pip as requirements of the build: none where torch is installed.
        setup_requires=[] if find_torch() else ["torch>=2.10"],
    )
