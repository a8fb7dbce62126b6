from typing import Any

def build_info() -> dict[str, Any]: ...
def cpu_supported() -> list[str]: ...
def cpu_selected() -> str: ...
def cpu_select(name: str) -> None: ...
def free_packed(handle: int) -> None: ...
def kept_scratch() -> tuple[int, int]: ...
def free_kept() -> None: ...
def cpu_multiply_adds(rounds: int) -> float: ...
def cpu_multiply_adds_bf16(rounds: int) -> float: ...
def plan(
    *,
    dtype: int,
    steps: int,
    batch: int,
    packed: bool,
    hidden_size: int,
    proj_size: int,
    layers: int,
    directions: int,
    backward: bool,
    capability: int,
    sms: int,
    shared_per_block: int,
    algorithm: int,
    allow_tf32: bool,
    plain_cells: bool = True,
    layer_norm: bool = False,
    largest_cluster: int = 16,
) -> dict[str, Any]: ...
def generate_plan(
    *,
    element_bytes: int,
    hidden_size: int,
    layers: int,
    vocabulary: int,
    batch: int,
    capability: int,
    sms: int,
    shared_per_block: int,
) -> dict[str, Any]: ...
def cpu_division(
    *,
    costs: str,
    weight_bytes: int,
    input_size: int,
    hidden_size: int,
    steps: int,
    batch: int,
    directions: int,
    threads: int,
) -> dict[str, Any]: ...
