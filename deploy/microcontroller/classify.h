// From pixels to a label: what surrounds the network, with no header but its own.
#pragma once

#include <algorithm>

#include "model.h"

namespace model {

// rgb: kSize x kSize pixels, row by row, red first, 0 to 255, as they are: normalisation is inside the
// network. A camera's RGB565 or YUV has to become that first, and the whole picture, or its centre
// square, that size by averaging: skipped pixels cost accuracy.
inline void ToInput(const uint8_t* rgb, int8_t* input) {
  std::transform(rgb, rgb + kImageBytes, input,
                 [](uint8_t value) { return static_cast<int8_t>(value - kPixelOffset); });
}

inline int Best(const int8_t* output) {
  return static_cast<int>(std::max_element(output, output + kClasses) - output);
}

inline float Score(int8_t value) { return static_cast<float>(value - kZeroPoint) * kScale; }

}  // namespace model
