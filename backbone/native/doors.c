/* The doors from XLA on a CPU: its foreign function interface, in C. See backbone/native/__init__.py. */
#define _GNU_SOURCE

#include "attention.h"
#include "gather.h"
#include "product.h"
#include "store.h"
#include "xla/ffi/api/c_api.h"

static XLA_FFI_Error *fail(const XLA_FFI_Api *api, const char *message) {
  XLA_FFI_Error_Create_Args args;
  memset(&args, 0, sizeof args);
  args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  args.message = message;
  args.errc = XLA_FFI_Error_Code_INVALID_ARGUMENT;
  return api->XLA_FFI_Error_Create(&args);
}

/* XLA asks every handler once what it is. */
static int answered_metadata(XLA_FFI_CallFrame *frame) {
  /* The base type of an extension has another name in every release; its layout has not changed. */
  XLA_FFI_Metadata_Extension *extension = (XLA_FFI_Metadata_Extension *)frame->extension_start;
  if (!extension || extension->extension_base.type != XLA_FFI_Extension_Metadata) return 0;
  extension->metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  extension->metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return 1;
}

static int is_weight_type(XLA_FFI_DataType t) { return t == XLA_FFI_DataType_F32 || t == XLA_FFI_DataType_BF16; }

/* Arguments x [m, k] and w [n, k], both float32 or both bfloat16; result y [m, n] float32. */
XLA_FFI_Error *headway_matmul(XLA_FFI_CallFrame *frame) {
  if (answered_metadata(frame)) return 0;
  if (frame->args.size != 2 || frame->rets.size != 1) return fail(frame->api, "headway_matmul: wrong arity");
  const XLA_FFI_Buffer *x = frame->args.args[0], *w = frame->args.args[1], *y = frame->rets.rets[0];
  if (x->rank != 2 || w->rank != 2 || x->dims[1] != w->dims[1] || x->dtype != w->dtype || !is_weight_type(w->dtype) ||
      y->dtype != XLA_FFI_DataType_F32)
    return fail(frame->api, "headway_matmul: wants x [m, k] and w [n, k], both float32 or both bfloat16");
  product((Product){w->data, x->data, y->data, w->dims[0], w->dims[1], x->dims[0], 0,
                    w->dtype == XLA_FFI_DataType_BF16});
  return 0;
}

/* Arguments q [b, s, h, hd] float32, k and v [b, kh, c, hd] both float32 or both bfloat16, mask [b, s, c] bool;
 * result [b, s, h, hd] float32. */
XLA_FFI_Error *headway_attend(XLA_FFI_CallFrame *frame) {
  if (answered_metadata(frame)) return 0;
  if (frame->args.size != 4 || frame->rets.size != 1) return fail(frame->api, "headway_attend: wrong arity");
  const XLA_FFI_Buffer *q = frame->args.args[0], *k = frame->args.args[1], *v = frame->args.args[2],
                       *mask = frame->args.args[3], *y = frame->rets.rets[0];
  if (q->rank != 4 || k->rank != 4 || v->rank != 4 || mask->rank != 3 || q->dtype != XLA_FFI_DataType_F32 ||
      y->dtype != XLA_FFI_DataType_F32 || k->dtype != v->dtype || !is_weight_type(k->dtype) ||
      mask->dtype != XLA_FFI_DataType_PRED || q->dims[3] % LANES || q->dims[3] > MAX_HEAD_DIM ||
      q->dims[3] != k->dims[3] || q->dims[2] % k->dims[1] || q->dims[0] != k->dims[0])
    return fail(frame->api, "headway_attend: wants q [b, s, h, hd], k and v [b, kh, c, hd], mask [b, s, c]");
  Attention a = {q->data, k->data, v->data, mask->data, y->data, 0, q->dims[0], q->dims[1], q->dims[2],
                 k->dims[1], k->dims[2], k->dims[3], k->dtype == XLA_FFI_DataType_BF16};
  return attention(a) ? fail(frame->api, "headway_attend: out of memory") : 0;
}

/* Arguments cache [b, kh, c, hd] float32 or bfloat16, block [b, s, kh, hd] float32, pos [b] int32; the result is the
 * cache, in the same memory where XLA grants the alias. */
XLA_FFI_Error *headway_store(XLA_FFI_CallFrame *frame) {
  if (answered_metadata(frame)) return 0;
  if (frame->args.size != 3 || frame->rets.size != 1) return fail(frame->api, "headway_store: wrong arity");
  const XLA_FFI_Buffer *cache = frame->args.args[0], *block = frame->args.args[1], *pos = frame->args.args[2],
                       *result = frame->rets.rets[0];
  if (cache->rank != 4 || block->rank != 4 || pos->rank != 1 || !is_weight_type(cache->dtype) ||
      result->dtype != cache->dtype || block->dtype != XLA_FFI_DataType_F32 || pos->dtype != XLA_FFI_DataType_S32 ||
      block->dims[0] != cache->dims[0] || block->dims[2] != cache->dims[1] || block->dims[3] != cache->dims[3] ||
      pos->dims[0] != cache->dims[0])
    return fail(frame->api, "headway_store: wants cache [b, kh, c, hd], block [b, s, kh, hd], pos [b]");
  int bf16 = cache->dtype == XLA_FFI_DataType_BF16;
  if (result->data != cache->data) {
    size_t bytes = bf16 ? 2 : 4;
    for (int i = 0; i < 4; i++) bytes *= (size_t)cache->dims[i];
    memcpy(result->data, cache->data, bytes);
  }
  store(&(Store){block->data, pos->data, result->data, cache->dims[0], block->dims[1], cache->dims[1],
                 cache->dims[2], cache->dims[3], bf16});
  return 0;
}

/* Arguments table [v, d] float32 or bfloat16, ids [n] int32; result [n, d] float32. An id outside is clamped. */
XLA_FFI_Error *headway_rows(XLA_FFI_CallFrame *frame) {
  if (answered_metadata(frame)) return 0;
  if (frame->args.size != 2 || frame->rets.size != 1) return fail(frame->api, "headway_rows: wrong arity");
  const XLA_FFI_Buffer *table = frame->args.args[0], *ids = frame->args.args[1], *y = frame->rets.rets[0];
  if (table->rank != 2 || ids->rank != 1 || y->rank != 2 || !is_weight_type(table->dtype) ||
      ids->dtype != XLA_FFI_DataType_S32 || y->dtype != XLA_FFI_DataType_F32 || table->dims[1] != y->dims[1])
    return fail(frame->api, "headway_rows: wants table [v, d] and ids [n]");
  int64_t width = table->dims[1], last = table->dims[0] - 1;
  for (int64_t i = 0; i < ids->dims[0]; i++) {
    int64_t id = ((const int32_t *)ids->data)[i];
    id = id < 0 ? 0 : id > last ? last : id;
    float *to = (float *)y->data + i * width;
    if (table->dtype == XLA_FFI_DataType_F32)
      memcpy(to, (const float *)table->data + id * width, sizeof(float) * (size_t)width);
    else
      for (int64_t j = 0; j < width; j++) to[j] = bf16_to_f32(((const uint16_t *)table->data)[id * width + j]);
  }
  return 0;
}

/* Arguments: rows x, matrix w [nb, bn, k], ids [n] int32, how many of them count [1] int32; result y float32. `in`: x is
 * [m, k] of w's type and y [m, n * bn], else x is [m, n * bn] float32 and y [m, k]. */
static XLA_FFI_Error *gather_door(XLA_FFI_CallFrame *frame, int in) {
  if (answered_metadata(frame)) return 0;
  if (frame->args.size != 4 || frame->rets.size != 1) return fail(frame->api, "headway_gather: wrong arity");
  const XLA_FFI_Buffer *x = frame->args.args[0], *w = frame->args.args[1], *ids = frame->args.args[2],
                       *active = frame->args.args[3], *y = frame->rets.rets[0];
  const XLA_FFI_Buffer *deep = in ? x : y, *named = in ? y : x;
  if (x->rank != 2 || w->rank != 3 || ids->rank != 1 || y->rank != 2 || active->rank != 1 || active->dims[0] != 1 ||
      deep->dims[1] != w->dims[2] || named->dims[1] != ids->dims[0] * w->dims[1] || x->dims[0] != y->dims[0] ||
      !is_weight_type(w->dtype) || x->dtype != (in ? w->dtype : XLA_FFI_DataType_F32) ||
      y->dtype != XLA_FFI_DataType_F32 || ids->dtype != XLA_FFI_DataType_S32 || active->dtype != XLA_FFI_DataType_S32)
    return fail(frame->api, "headway_gather: wants x, w [nb, bn, k], ids [n] and how many of them count [1]");
  int64_t count = *(const int32_t *)active->data;
  count = count < 0 ? 0 : count > ids->dims[0] ? ids->dims[0] : count;
  Product p = {w->data, x->data, y->data, named->dims[1], w->dims[2], x->dims[0], 0, w->dtype == XLA_FFI_DataType_BF16};
  Gather g = {p, ids->data, w->dims[0], w->dims[1], count, 0};
  if (in) rows_in(g);
  else rows_out(g);
  return 0;
}

XLA_FFI_Error *headway_rows_in(XLA_FFI_CallFrame *frame) { return gather_door(frame, 1); }
XLA_FFI_Error *headway_rows_out(XLA_FFI_CallFrame *frame) { return gather_door(frame, 0); }
