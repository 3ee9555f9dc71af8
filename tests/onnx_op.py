"""fastbn as the BatchNormalization of ONNX's reference evaluator, in all versions of the operator from 6 on."""

from onnx.reference.op_run import OpRun

import fastbn


class BatchNormalization(OpRun):
    """Its name is the operator's: ``ReferenceEvaluator(model, new_ops=[BatchNormalization])``."""

    op_domain = ""

    def _run(self, x, scale, bias, mean, var, *, epsilon, momentum, training_mode=0, is_test=0, spatial=1):
        opset = self.run_params["opsets"][self.domain]
        training = training_mode if opset >= 14 else len(self.output) > 1 if opset >= 7 else not is_test
        axis = 1 if spatial else tuple(range(1, x.ndim))  # up to 8: statistics for each activation
        if not training:
            return (fastbn.batch_norm(x, mean, var, scale, bias, axis=axis, eps=epsilon),)
        y, saved = fastbn.batch_norm_train(x, scale, bias, axis=axis, eps=epsilon)
        mean, var = mean.copy(), var.copy()
        fastbn.update_running(mean, var, saved.moments, momentum=momentum, correction=0)
        return (y, mean, var, saved.mean.astype(x.dtype), saved.var.astype(x.dtype))[: len(self.output)]
