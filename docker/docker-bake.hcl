// Both GPU images at once, for BuildKit: what their files have in common is built once.
//   docker buildx bake --file docker/docker-bake.hcl            both
//   docker buildx bake --file docker/docker-bake.hcl volta      one
// The settings of docker/build.sh, as variables of the environment.

variable "TAG" { default = "0.1.0" }
variable "REVISION" { default = "unknown" }
variable "CREATED" { default = "unknown" }
variable "BUILD_BASE" { default = "docker.io/nvidia/cuda:12.8.1-devel-ubuntu24.04" }
variable "BUILD_DIGEST" { default = "" }
variable "FINAL_BASE" { default = "docker.io/nvidia/cuda:12.8.1-base-ubuntu24.04" }
variable "FINAL_DIGEST" { default = "" }
variable "MAX_JOBS" { default = "" }
variable "WITH_FLASH_ATTN" { default = "1" }

group "default" { targets = ["ampere", "volta"] }

target "_both" {
  context = "."
  target  = "final"
  args = {
    REVISION     = REVISION
    CREATED      = CREATED
    BUILD_BASE   = BUILD_BASE
    BUILD_DIGEST = BUILD_DIGEST
    FINAL_BASE   = FINAL_BASE
    FINAL_DIGEST = FINAL_DIGEST
  }
}

target "ampere" {
  inherits   = ["_both"]
  dockerfile = "Dockerfile"
  tags       = ["sft_job:${TAG}-ampere"]
  args       = { MAX_JOBS = MAX_JOBS, WITH_FLASH_ATTN = WITH_FLASH_ATTN }
}

target "volta" {
  inherits   = ["_both"]
  dockerfile = "docker/Dockerfile.v100"
  tags       = ["sft_job:${TAG}-volta"]
}
