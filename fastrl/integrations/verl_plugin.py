"""What verl imports in its workers: actor_rollout_ref.model.external_lib names this module.

Importing it registers every policy loss that verl can compute and the backend of the fused head.
"""

from fastrl.integrations.verl import register_fused_head, register_policy_losses

register_policy_losses()
register_fused_head()
