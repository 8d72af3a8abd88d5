"""The user's own graph, run by PyTorch: gradients, values inside it, and changed weights back into the file.

    module = GraphModule("model.onnx").to(device)
    with module.at("/blocks.0/mlp/fc2/Add_output_0", torch.mul, gates[:, 0, :, None]):  # gates [image, token]
        loss = F.cross_entropy(module(images), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, gates)  # one row per image

One small function for each operator lies in a table (``short``, ``layout``, ``products``); a new operator is one more,
and onnx's own cases test it. ``lower`` makes calls of nodes, ``program`` picks those that the asked values need and
frees values after their last reader, ``peepholes`` runs some neighbours as one. No architecture is named.

How learning uses it. What follows the token axis names three kinds of places, and needs nothing else of a model:

* *updates*: the input of a residual Add that comes from a branch. ``torch.mul`` with a gate for each token of each
  image; ``reader`` is that Add, where something else reads the branch too.
* *keys*: attention logits, the input of a Softmax or :func:`logits_name` of a node Attention. ``torch.add`` with a bias
  for each key of each image.
* *reads*: what a head or a tap reads of the stream, as updates.

One backward pass gives per-image gradients of all gates: the second moments of
:class:`~vpruner.prune.fisher.GateGradients`, whose search does not ask where they come from. A plan that is closed
already is the same places with 0 and ``-inf``. Weights need no gradients meanwhile
(:func:`~vpruner.prune.fisher.frozen`).

A refit of the last MatMul or Gemm of a branch needs its input x [image, token, in], which ``compute`` reads by name in
the masked model, and the stream y that the dense model has behind the Add: normal equations sum x'x and x'(y - rest)
over the images. The solution goes into the parameter that ``weights()`` has under the name of the initializer (turned
if Gemm says transB), for the loss and for what is judged; :func:`write_back` puts it into the user's model.
"""

from .lower import logits_name
from .module import GraphModule
from .weights import write_back

__all__ = ["GraphModule", "logits_name", "write_back"]
