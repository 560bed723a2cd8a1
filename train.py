import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import rkfast

dist.init_process_group("gloo")  # "nccl" on GPUs
torch.manual_seed(0)
model = nn.Sequential(
    rkfast.nn.DenseBlock(3, 16, 8, fused=False), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 16, 1, bias=False),
    nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
)  # fmt: skip
ddp = nn.parallel.DistributedDataParallel(model)
ddp.module = nn.SyncBatchNorm.convert_sync_batchnorm(ddp.module)  # on GPUs before or behind the wrapping
rkfast.fuse(ddp)
torch.manual_seed(dist.get_rank())
images, labels = torch.randn(4, 16, 16, 16), torch.randint(10, (4,))
decided = rkfast.tune(ddp, images)

optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
for _ in range(3):
    F.cross_entropy(ddp(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()

means = [torch.empty(40) for _ in range(dist.get_world_size())]
dist.all_gather(means, model[1].running_mean)
if dist.get_rank() == 0:
    print(f"{len(decided)} decisions; the same statistics: {all(torch.equal(m, means[0]) for m in means)}")
    torch.save(model.state_dict(), "model.pt")
dist.destroy_process_group()
