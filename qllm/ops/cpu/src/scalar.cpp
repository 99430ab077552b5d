#include "prefill_attention.h"
#include "blocks.h"
#include "dense.h"
#include "descent.h"
#include "experts.h"
#include "kernels.h"
#include "limits.h"
#include "linear.h"
#include "packed_embedding.h"
#include "rounding.h"
#include "sequence_attention.h"
#include "steps.h"

const qllm::Path qllm::scalar_path = QLLM_WHOLE_PATH("scalar");
