"""Full-parameter fine-tuning of LLaMA-family chat models from one job file.

    layer 0   errors          error kinds and exit codes
    layer 1   yamltext        the text of a job file: values as written, with their lines
              paths           paths in it: $VAR and ~, what can be one
              schema          the job file: its keys, units and defaults
              extras          train.extra: which TrainingArguments, which values
              config          reading it: overrides, faults
              seal            what a folder holds, by size and checksum
              files           how files and folders are written
              cli             arguments, messages, requests to stop
    layer 2   rundir          every name in the run directory and the cache
    no torch  attempt         one attempt at a job: its number, its records, its marks
              records         the records of a data file, and what is wrong with the file
              formats         what the keys of other tools' data mean here
              conversations   conversations: read, checked, cut to what can be trained on
              templates       chat templates as data
              batching        which samples make a step, and who computes them
              hardware        what this machine has
              attention       the attention kernels and the choice among them
              families        which models train here, and what keeps the others from it
              modelfiles      a model's files as they are on disk, checked
              facts           what config.json and the weights' headers say
              prepared        what is already on this machine for a job
              result          the model of a finished run: whether it is there as written
              identity        what a run is made of, by content
              memory          bytes of a device at the peak of a step
              flops           operations of a step, and how long they take
              fit             what fits: checkpointing, micro-batch size, what to change
              images          what is known of a container image from outside
              rates           the learning rate of every step
              preflight       what is looked at before a run directory is claimed
              choices         the other decisions of a plan: precision, kernels, positions
              workers         what each training process is given
              place           which of them this process is
              launcher        the training processes of one machine: started, watched, stopped
              compiled        what is compiled once on each machine
              plan            everything derived from a job, in one place; `sft-job plan`
              start           what has to be true before the processes of a job train
              jobscript       the text of a job script
              slurm           what Slurm says; a job under submitit
              follow          a submitted job from outside: status, output, end
              enqueue         a job's script into the queue, once
    layer 3   network         the way to other machines and GPUs, as gloo and NCCL are told
              rendezvous      how the processes find each other
    torch     world           the processes that train together, and what they agree on
              tokenizer       read or converted, and checked
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
              worker          one training process, from its first line to its last
    layer 5   train           `sft-job train`
    entry     submit          `sft-job submit`
              data            `sft-job data`
              chat            `sft-job chat`

A file imports only from its own layer and those before it; nobody imports layer 5.
"""

import signal
import sys

__version__ = "0.1.0"

# Run as a program, Ctrl-C before the program has handlers of its own ends it without a traceback
# of half-imported files. (`python -m` has put "-m" there while it imports this.)
if sys.argv and sys.argv[0].rpartition("/")[2] in ("-m", "sft-job"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
