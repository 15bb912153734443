"""A decoder-only transformer in the form that has become common: RMSNorm before each part (Zhang and Sennrich, 2019),
rotary positions (Su et al., 2021), SwiGLU (Shazeer, 2020), grouped-query attention (Ainslie et al., 2023)."""
