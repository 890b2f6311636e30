"""The model being tuned: policy, weight views, paths and samplers, families of pipelines, presets."""
