"""Gates and sparse activations: hard concrete, JumpReLU, TopK and BatchTopK."""

from ._hard_concrete import hard_concrete as hard_concrete
from ._hard_concrete import hard_concrete_deterministic as hard_concrete_deterministic
from ._threshold import jump_relu as jump_relu
from ._threshold import step as step
from ._top_k import batch_top_k as batch_top_k
from ._top_k import batch_top_k_threshold as batch_top_k_threshold
from ._top_k import top_k as top_k
