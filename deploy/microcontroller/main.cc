// Names what the camera shows. Yours to change: Capture() at least.

#include <algorithm>

#include "classify.h"
#include "golden.h"
#include "model.h"
#include "model_ops.h"
#include "tensorflow/lite/micro/micro_interpreter.h"
#include "tensorflow/lite/micro/micro_log.h"
#include "tensorflow/lite/micro/system_setup.h"
#include "tensorflow/lite/schema/schema_generated.h"

namespace {

alignas(16) uint8_t arena[model::kArenaBytes];

// Your camera's code. False ends the loop, which a board without a camera does at once.
bool Capture(uint8_t* rgb) {
  (void)rgb;
  return false;
}

const int8_t* Run(tflite::MicroInterpreter& interpreter, const uint8_t* rgb) {
  model::ToInput(rgb, interpreter.input(0)->data.int8);
  return interpreter.Invoke() == kTfLiteOk ? interpreter.output(0)->data.int8 : nullptr;
}

// Kernels may round differently. More than two steps mostly are an error in the build: a faulty kernel,
// memory that is written twice.
bool SelfTest(tflite::MicroInterpreter& interpreter) {
  int largest = 0;
  for (int image = 0; image < golden::kImages; ++image) {
    const int8_t* output = Run(interpreter, golden::kPixels[image]);
    if (output == nullptr) return false;
    for (int i = 0; i < model::kClasses; ++i) {
      const int step = output[i] - golden::kOutputs[image][i];
      largest = std::max(largest, step < 0 ? -step : step);
    }
  }
  MicroPrintf("golden images: %d steps of 256 apart at most", largest);
  return largest <= 2;
}

}  // namespace

int main() {
  tflite::InitializeTarget();
  const tflite::Model* net = tflite::GetModel(model::kData);
  if (net->version() != TFLITE_SCHEMA_VERSION) {
    MicroPrintf("the model has another schema: take a newer TensorFlow Lite Micro");
    return 1;
  }
  static model::Ops ops;
  if (model::AddOps(ops) != kTfLiteOk) return 1;
  static tflite::MicroInterpreter interpreter(net, ops, arena, sizeof(arena));
  if (interpreter.AllocateTensors() != kTfLiteOk) {
    MicroPrintf("no tensors: unless it says another reason above, make the arena larger");
    return 1;
  }
  MicroPrintf("arena: %d of %d bytes used", static_cast<int>(interpreter.arena_used_bytes()),
              static_cast<int>(sizeof(arena)));
  if (!SelfTest(interpreter)) return 1;

  static uint8_t rgb[model::kImageBytes];
  while (Capture(rgb)) {
    const int8_t* output = Run(interpreter, rgb);
    if (output == nullptr) return 1;
    const int best = model::Best(output);
    MicroPrintf("%s %d%%", model::kLabels[best],
                static_cast<int>(100 * model::Score(output[best]) + 0.5f));
  }
  return 0;
}
