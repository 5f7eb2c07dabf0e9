"""The studies by name; each a declaration in a file of its own."""

from . import (
    async_sgd,
    churn,
    communication,
    data_partition,
    image_codistillation,
    lm_codistillation,
    offline_distillation,
    sgd_scaling,
    staleness,
    topology,
)

STUDIES = {
    module.STUDY.name: module.STUDY
    for module in (
        sgd_scaling,
        async_sgd,
        lm_codistillation,
        offline_distillation,
        data_partition,
        staleness,
        image_codistillation,
        churn,
        communication,
        topology,
    )
}
