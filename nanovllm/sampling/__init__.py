"""What a request may ask of its draws, besides the draw itself, which is kernels/sampling_torch.py's.

On the host: `defaults` has the parameters of requests that bring none, `row_params` what the device has of a row's,
`adjustments` and `constraints` what changes logits, `step_sampling` what the ranks are told of a step, `logprobs` what
comes back, `text_end` whether a drawn token ends its text. On the device: `device` draws from adjusted logits.
"""
