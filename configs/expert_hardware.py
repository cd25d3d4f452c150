"""Where experts may lie and what lies between: descriptions for scripts/expert_simulation.py. Nothing is measured.

model: a name of backbone/presets.py. memory_bytes_per_s: of the memory the device computes from. link_bytes_per_s: at
which experts reach it, in one direction. Both are what documents state, which no program quite reaches.
"""

# PCI Express Base Specification 4.0 and 5.0: 16 and 32 GT/s a lane, 128b/130b; 16 lanes, one direction.
PCIE4_X16 = 16e9 / 8 * 128 / 130 * 16
PCIE5_X16 = 32e9 / 8 * 128 / 130 * 16

CASES = {
    # NVIDIA A100 80GB data sheet, SXM column: 2,039 GB/s; PCIe Gen4. Experts in host memory.
    'olmoe-pcie4': dict(model='olmoe-1b-7b', item_bytes=2, memory_bytes_per_s=2.039e12, link_bytes_per_s=PCIE4_X16),
    # NVIDIA H100 data sheet, SXM column: 3.35 TB/s; PCIe Gen5. Experts in host memory.
    'olmoe-pcie5': dict(model='olmoe-1b-7b', item_bytes=2, memory_bytes_per_s=3.35e12, link_bytes_per_s=PCIE5_X16),
    # The same data sheet: NVLink 900 GB/s, both directions together. Experts in the memory of other GPUs.
    'mixtral-nvlink': dict(model='mixtral-8x7b', item_bytes=2, memory_bytes_per_s=3.35e12, link_bytes_per_s=450e9),
    # Apple newsroom, 5 June 2023: M2 Ultra, 800 GB/s of unified memory. A copy within it reads and writes, so half of
    # that; what it takes from the computation beside it is not modelled.
    'olmoe-unified': dict(model='olmoe-1b-7b', item_bytes=2, memory_bytes_per_s=800e9, link_bytes_per_s=400e9),
}
