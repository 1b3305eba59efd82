// SiLU(x G^T) * (x U^T) on Hopper, for at most 2 * TOKENS rows; launched by gated.py.
//
// A tile is 192 rows of the weight times all rows of x. Each of the two CTAs of a cluster computes half of the rows of x
// and loads half of the weight's tile for both. One thread issues loads of blocks of 64 columns to the copy engine, three
// warpgroups multiply. The weight's rows are in groups of 16, eight of G and the same eight of U: so a thread has the
// matching sums of G and U, and only the result is written.
//
// gated.py puts TOKENS, STAGES, HALF (the 16-bit type in PTX) and multiply() before this text.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int DEPTH = 64, MULTIPLIERS = 3 * 128, GROUPS = 12;  // of 16 rows, one a warp
constexpr u32 WEIGHT_BYTES = 192 * DEPTH * 2, STAGE_BYTES = WEIGHT_BYTES + TOKENS * DEPTH * 2;

struct alignas(64) TensorMap { u64 words[16]; };

struct Shape {
    int num_tokens, num_outputs;
    int blocks;  // of DEPTH columns
    int tiles;
};

__device__ u32 address(const void* shared) { return static_cast<u32>(__cvta_generic_to_shared(shared)); }

__device__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ void arrive_at(u32 barrier, u32 cta) {
    // The narrow default scope is enough: no write to global memory has to become visible with this arrival.
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(cta) : "memory");
}

__device__ void sync_cluster() { asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory"); }

__device__ void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ u64 matrix(u32 shared) {  // rows of 128 bytes, swizzled, eight of them 1024 bytes from the next eight
    return ((shared & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

__device__ float gate(float x, float up) { return __fdividef(x, 1.0f + __expf(-x)) * up; }

__device__ u32 pack_and_transpose(float low, float high) {  // over the 8 x 8 numbers of a warp
    u32 pair, result;
    asm("cvt.rn." HALF "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// The tiles of a cluster, block by block, and the buffer of each.
struct Cursor {
    int tile, block = 0, stage = 0, round = 0;

    __device__ void advance(const Shape& shape) {
        if (++stage == STAGES) stage = 0, ++round;
        if (++block == shape.blocks) block = 0, tile += gridDim.x / 2;
    }
};

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(512, 1)
gated(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x, u32* out,
      const __grid_constant__ Shape shape) {
    extern __shared__ unsigned char unaligned[];
    __shared__ u64 barriers[2 * STAGES];
    u32 buffers = (address(unaligned) + 1023) & ~1023u, full = address(barriers), empty = full + 8 * STAGES;
    int thread = threadIdx.x, rank = blockIdx.x % 2;
    Cursor at{static_cast<int>(blockIdx.x / 2)};
    asm volatile("griddepcontrol.launch_dependents;");
    if (thread == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * stage));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 6;" ::"r"(empty + 8 * stage));  // both CTAs' warpgroups
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    sync_cluster();

    if (thread >= MULTIPLIERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (thread == MULTIPLIERS) {
            auto load_weight = [&](const Cursor& at) {  // half of the tile, for both CTAs
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + 8 * at.stage),
                             "r"(STAGE_BYTES) : "memory");
                asm volatile(
                    "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                    "[%0], [%1, {%2, %3, %3, %4}], [%5], %6;" ::"r"(buffers + at.stage * STAGE_BYTES + rank * (WEIGHT_BYTES / 2)),
                    "l"(&weight), "r"(at.block * DEPTH), "r"(0), "r"(at.tile * GROUPS + rank * GROUPS / 2), "r"(full + 8 * at.stage),
                    "h"(static_cast<u16>(3)) : "memory");
            };
            auto load_x = [&](const Cursor& at) {
                asm volatile(
                    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                    "[%0], [%1, {%2, %3}], [%4];" ::"r"(buffers + at.stage * STAGE_BYTES + WEIGHT_BYTES), "l"(&x),
                    "r"(at.block * DEPTH), "r"(rank * TOKENS), "r"(full + 8 * at.stage) : "memory");
            };
            // The first loads of the weight do not wait for the kernel that writes x.
            int early = min(STAGES, shape.blocks);
            Cursor x_at = at;
            for (int i = 0; i < early; ++i, at.advance(shape)) load_weight(at);
            wait_for_inputs();
            for (int i = 0; i < early; ++i, x_at.advance(shape)) load_x(x_at);
            for (; at.tile < shape.tiles; at.advance(shape)) {
                if (at.round) wait(empty + 8 * at.stage, (at.round - 1) & 1);
                load_weight(at);
                load_x(at);
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 152;");
        wait_for_inputs();
        int warp = thread / 32, lane = thread % 32;
        float sums[TOKENS / 2];
        auto release = [&](int stage) {
            if (thread % 128 < 2) arrive_at(empty + 8 * stage, thread % 128);
        };
        while (at.tile < shape.tiles) {
            int tile = at.tile, previous = 0;
            for (int i = 0; i < shape.blocks; ++i, at.advance(shape)) {
                wait(full + 8 * at.stage, at.round & 1);
                u32 buffer = buffers + at.stage * STAGE_BYTES;
                u64 a = matrix(buffer + warp / 4 * 64 * 128), b = matrix(buffer + WEIGHT_BYTES);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int k = 0; k < DEPTH / 16; ++k) multiply(sums, a + 2 * k, b + 2 * k, i != 0 || k != 0);
                asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (i != 0) release(previous);
                previous = at.stage;
            }
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            release(previous);
            // A thread has row lane / 4 of G and of U, two tokens of each eight; transposed, one token and two outputs.
            int rows = tile * GROUPS + warp, width = shape.num_outputs / 2, token = rank * TOKENS + lane / 4;
            u32* place = out + static_cast<u64>(token) * width + rows * 4 + lane % 4;
            bool inside = rows * 8 < shape.num_outputs;
#pragma unroll
            for (int j = 0; j < TOKENS / 8; ++j, place += 8 * width) {
                float* sum = sums + 4 * j;
                u32 pair = pack_and_transpose(gate(sum[0], sum[2]), gate(sum[1], sum[3]));
                if (inside && token + 8 * j < shape.num_tokens) *place = pair;
            }
        }
    }
    sync_cluster();  // the other CTA may still arrive at our barriers
}
