"""Every published method by name, and in families."""

from fastrl.methods.group_relative import GROUP_RELATIVE
from fastrl.methods.hybrids import HYBRIDS
from fastrl.methods.policy_gradient import POLICY_GRADIENT
from fastrl.methods.preference import PREFERENCE
from fastrl.methods.record import Method
from fastrl.methods.regression import REGRESSION
from fastrl.methods.sequence_level import SEQUENCE_LEVEL
from fastrl.methods.shaped import SHAPED
from fastrl.methods.token_selective import TOKEN_SELECTIVE
from fastrl.methods.value_model import VALUE_MODEL

FAMILIES: dict[str, tuple[Method, ...]] = {
    "Policy gradients and PPO": POLICY_GRADIENT,
    "Group-relative": GROUP_RELATIVE,
    "Sequence ratios, soft trust regions, sampler corrections": SEQUENCE_LEVEL,
    "Regression": REGRESSION,
    "Value models": VALUE_MODEL,
    "Selection of tokens, completions and prompts": TOKEN_SELECTIVE,
    "Replay, guidance and hybrids": HYBRIDS,
    "Rewards, exploration and agents": SHAPED,
    "Preferences": PREFERENCE,
}
METHODS: dict[str, Method] = {
    method.name: method for methods in FAMILIES.values() for method in methods
}
