"""The families of models that can be used: one module each.

A family is a subclass of `models.backbone.Backbone`, which its module calls `FAMILY`.
"""

FAMILIES = {
    "StableDiffusionPipeline": "models.families.stable_diffusion",
    "StableDiffusionXLPipeline": "models.families.stable_diffusion_xl",
    "StableDiffusion3Pipeline": "models.families.stable_diffusion_3",
    "FluxPipeline": "models.families.flux",
    "DiTPipeline": "models.families.dit",
    "DDPMPipeline": "models.families.pixel_ddpm",
}
"""The module of each family, by the class that model_index.json in a pipeline's folder names."""
