"""LoRA adapters: which modules one may target, and what it adds to products that run fused."""
