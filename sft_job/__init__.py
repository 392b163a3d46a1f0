"""Full-parameter fine-tuning of LLaMA-family chat models from one job file.

    layer 0   errors          error kinds and exit codes
    layer 1   schema          the job file: its keys, units and defaults
              config          reading it: overrides, faults
              cli             arguments, messages, requests to stop
    layer 2   rundir          every name in the run directory and the cache
    no torch  conversations   conversations: read, checked, cut to what can be trained on
              templates       chat templates as data
              batching        which samples make a step, and who computes them
              hardware        what this machine has
              attention       the attention kernels and the choice among them
              families        which models train here, and what keeps the others from it
              modelfiles      a model's files as they are on disk, checked
              facts           what config.json and the weights' headers say
              prepared        what is already on this machine for a job
              memory          bytes of a device at the peak of a step
              flops           operations of a step, and how long they take
              fit             what fits: checkpointing, micro-batch size, what to change
              choices         the other decisions of a plan: precision, kernels, positions
              workers         the training processes of one machine: started, watched, stopped
              plan            everything derived from a job, in one place; `sft-job plan`
              jobscript       the text of a job script
              slurm           what Slurm says; a job under submitit
              follow          a submitted job from outside: status, output, end
    layer 3   world           the processes that train together, and what they agree on
    torch     tokenizer       read or converted, and checked
              encode          text to ids and labels, once
              dataset         token cache, samples, a rank's share of each step
              varlen          attention over flattened samples
              loss            cross-entropy of supervised positions, never the full logits
              positions       rotary positions, scaled and compared with what the model computes
              weights         the tensors of weight files, compared with what the model has
              model           building the model, and its forward pass that returns a loss
              source          finding a model, and converting it to one layout
              settings        all of an exported model but its weights, written and rehearsed
              metrics         one record per logged step
              checkpoint      publishing, verifying and choosing checkpoints
    layer 4   fsdp            FSDP2: shard, save, load, gather
              zero3           DeepSpeed ZeRO-3: shard, save, load, gather
              selftest        before the first step: does the device compute what it should
              trainer         the Trainer subclass
              export          the final model, written and verified
    layer 5   train           `sft-job train`
    entry     submit          `sft-job submit`
              data            `sft-job data`
              chat            `sft-job chat`

A file imports only from its own layer and those before it; nobody imports layer 5.
"""

__version__ = "0.1.0"
