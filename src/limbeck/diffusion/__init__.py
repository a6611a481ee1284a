"""Diffusion: noise schedules, what networks predict, guidance, solvers, consistency functions and denoisers.

One notation throughout: x_t = alpha_t x0 + sigma_t eps, with data x0, noise eps ~ N(0, I) and a time t that grows
towards the noise. lambda_t = log(alpha_t / sigma_t) is half the log-SNR; it falls in t.
"""
