import requant

plan = requant.plan("recipe.yaml", overrides=["quantize.iters=50"])
print(plan.problems, plan.needs.vram_bytes)

result = requant.run("recipe.yaml", checkout="build/result")
if result.published:
    print(result.published.url)
if result.measured:
    print(result.measured.behaviour.perplexity_increase)

checkpoint = requant.inspect("Qwen/Qwen3.6-27B")
print(checkpoint.mtp.precision, checkpoint.engines["vllm"].reason)
