"""The replicas' side: health, responses, token counts."""
