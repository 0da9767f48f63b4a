"""What of a rank is in host memory while the engines generate, by the settings of ``drafts.kinds.offloads``.

    forward passes              weights
    log-probs of the reference  reference
    optimizer step              weights, gradients, optimizer state
    sync                        weights
    sampling                    nothing

Whatever uses a part asks for it here or in ``Trainable``, and it comes back. So the driver only says when parts may go.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skyrl_spec.drafts.kinds.offloads import offloads
from skyrl_spec.models.policy import PolicyModel
from skyrl_spec.settings.schema import Config
from skyrl_spec.training.host_copies import HostCopies
from skyrl_spec.training.optimizer import Trainable


class Offload:
    """Parts of one rank that go to host memory and come back.

    Args:
        model, reference: the policy, and its frozen copy if there is one.
        policy, draft: policy and draft with their optimizers, if they are trained.
    """

    def __init__(
        self,
        config: Config,
        model: PolicyModel,
        policy: Trainable | None,
        draft: Trainable | None,
        reference: PolicyModel | None,
    ):
        moved, device = offloads(config), next(model.parameters()).device
        goes = ((policy, moved.policy_state), (draft, moved.draft_state))
        self._trained = [trainable for trainable, is_set in goes if trainable is not None and is_set]
        modules = [model] if draft is None else [model, draft.module]
        self._weights = HostCopies(lambda: (one for module in modules for one in module.parameters()), device)
        self._reference_weights = HostCopies(
            lambda: () if reference is None else reference.parameters(), device, are_constant=True
        )
        self._moved, self._reference, self._device = moved, reference, device

    def training_state(self) -> None:
        """Moves optimizer state and gradients, after the last update of a step."""
        for trainable in self._trained:
            trainable.offload()
        self._release()

    def reference(self) -> None:
        """Moves the reference, after its log-probs of a batch."""
        if self._moved.reference:
            self._reference_weights.offload()
            self._release()

    def weights(self) -> None:
        """Moves the weights of policy and draft, after a sync."""
        if self._moved.weights:
            self._weights.offload()
        self._release()

    def require(self, model: nn.Module) -> None:
        """Brings back the weights of a forward pass: the reference's, or those of policy and draft."""
        (self._reference_weights if model is self._reference else self._weights).require()

    def current(self, tensor: Tensor) -> Tensor:
        """A tensor that is trained, or its copy in host memory while it is there."""
        for part in (self._weights, *(trainable.state for trainable in self._trained)):
            tensor = part.current(tensor)
        return tensor

    def _release(self) -> None:
        """Gives memory that PyTorch holds back to the device, for an engine of another process."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
