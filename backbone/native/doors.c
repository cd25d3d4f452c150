/* The doors from XLA on a CPU: its foreign function interface, in C. See backbone/native/__init__.py. */
#define _GNU_SOURCE

#include "attention.h"
#include "product.h"
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
