// The number formats of images, named where no torch type may be.
#pragma once

namespace sage_fast {

enum class Dtype { float32, float64, bfloat16, float16 };

}  // namespace sage_fast
