"""What is known of a prompt beside its own group: rewards of other policies and of other times."""

from fastrl.values.kinds import PROMPT_VALUES as PROMPT_VALUES
