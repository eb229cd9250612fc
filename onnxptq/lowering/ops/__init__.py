"""One module per operator family; importing this package registers them all."""

from onnxptq.lowering.ops import (  # noqa: F401 - imported for their registrations
    activation,
    attention,
    conv,
    elementwise,
    generate,
    indexing,
    layout,
    logic,
    matmul,
    normalization,
    pool,
    reduction,
    resize,
    roi,
    spatial,
)
