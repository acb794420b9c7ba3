"""Every operator on small shapes on the GPU, forward and backward: what compute-sanitizer watches."""

import torch

import ovseg_kernels as ok


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for B, T, N, D in ((2, 65, 70, 24), (1, 3, 257, 40)):
            patches = torch.randn(B, N, D, device="cuda", dtype=dtype, requires_grad=True)
            texts = torch.randn(T, D, device="cuda", dtype=dtype, requires_grad=True)
            mask = torch.rand(B, N, device="cuda") > 0.3
            for pool in ("vector", "score", "max"):
                out = ok.patch_text_similarity(patches, texts, patch_mask=mask, temperature=0.2, pool=pool)
                torch.autograd.grad(out.sum(), (patches, texts))
        for B, G, L, D in ((2, 8, 70, 24), (1, 65, 130, 40)):
            queries, keys, values = (torch.randn(B, n, D, device="cuda", dtype=dtype, requires_grad=True) for n in (G, L, L))
            mask, rng = torch.rand(B, L, device="cuda") > 0.3, ok.philox.make_rng(1, device="cuda")
            for hard in (True, False):
                out = ok.center_assignment(queries, keys, values, mask=mask, rng=rng, hard=hard)[0]
                torch.autograd.grad(out.sum(), (queries, keys, values))
            weight, vector = torch.randn(D, D, device="cuda", requires_grad=True), torch.randn(D, device="cuda", requires_grad=True)
            out = ok.folded_center_assignment(queries, keys, weight, weight, vector, vector, mask=mask, rng=rng)[0]
            torch.autograd.grad(out.sum(), (queries, keys, weight, vector))
            grouped = weight[:, : D // 4]
            out = ok.segclip_center_assignment(queries, keys, grouped, grouped, *(vector,) * 4, mask=mask, rng=rng)[0]
            torch.autograd.grad(out.sum(), (queries, keys, weight, vector))
        for sampling in ("topk", "gumbel"):
            pixels, texts = (torch.randn(*s, device="cuda", dtype=dtype, requires_grad=True) for s in ((3, 70, 24), (3, 24)))
            rng = ok.philox.make_rng(1, device="cuda") if sampling == "gumbel" else None
            torch.autograd.grad(ok.dense_contrastive_loss(pixels, texts, k_pos=5, k_neg=9, sampling=sampling, rng=rng), (pixels, texts))
        for kind in ("softmax", "sigmoid"):
            image, text = (torch.randn(70, 24, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
            torch.autograd.grad(ok.contrastive_loss(image, text, 5.0, kind=kind), (image, text))
    for dtype in (torch.float32, torch.float16):
        logits = torch.randn(2, 20, 5, 7, device="cuda", dtype=dtype)
        ok.upsample_argmax(logits, (33, 40), threshold=0.1, bias=torch.zeros(20, device="cuda"), return_value=True)
        origins, tables = torch.tensor([[0, 0], [0, 20]], device="cuda"), torch.randn(2, 20, 9, device="cuda", dtype=dtype)
        for options in ({"activation": "sigmoid"}, {"activation": "softmax", "stage": "merged"}, {"tables": tables}):
            ok.window_argmax(logits, origins, (33, 40), (33, 60), (29, 50), return_value=True, **options)
        labels = torch.randint(0, 22, (2, 33, 40), device="cuda")
        for gamma in (2.0, 1.5):
            leaf = logits.clone().requires_grad_()
            focal, dice, _ = ok.upsample_mask_loss(leaf, labels, gamma=gamma, ignore_index=21)
            torch.autograd.grad((focal + dice).sum(), leaf)
    similarity = torch.randn(33, 33, device="cuda", requires_grad=True)
    ok.similarity_contrastive_loss(similarity, 5.0).backward()
    torch.cuda.synchronize()
    print(ok.explain("patch_text_similarity", similarity))


if __name__ == "__main__":
    main()
