# Types of csrc/bindings.cpp.
build_summary: str
torch_version: str
compiler: str
cuda_archs: str
cuda_version: str

def cpu_isa() -> str: ...
def best_cpu_isa() -> str: ...
def set_cpu_isa(name: str) -> None: ...
