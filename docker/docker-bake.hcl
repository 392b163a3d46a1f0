// Both GPU images at once, for BuildKit: what their files have in common is built once.
//   docker buildx bake --file docker/docker-bake.hcl            both
//   docker buildx bake --file docker/docker-bake.hcl volta      one
// Settings are variables of the environment; mirrors are secrets, as docker/build.sh gives them:
//   --set '*.secrets=id=pip_conf,src=pip.conf'

variable "TAG" { default = "0.1.0" }
variable "REVISION" { default = "unknown" }
variable "CREATED" { default = "unknown" }
variable "BUILD_BASE" { default = "docker.io/nvidia/cuda:12.8.1-devel-ubuntu24.04" }
variable "BUILD_DIGEST" { default = "" }
variable "FINAL_BASE" { default = "docker.io/library/ubuntu:24.04" }
variable "FINAL_DIGEST" { default = "" }
variable "MAX_JOBS" { default = "" }
variable "WITH_FLASH_ATTN" { default = "1" }
variable "WITH_FA3" { default = "0" }
variable "FA3_SHA256" { default = "" }

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
  args = {
    MAX_JOBS        = MAX_JOBS
    WITH_FLASH_ATTN = WITH_FLASH_ATTN
    WITH_FA3        = WITH_FA3
    FA3_SHA256      = FA3_SHA256
  }
}

target "volta" {
  inherits   = ["_both"]
  dockerfile = "docker/Dockerfile.v100"
  tags       = ["sft_job:${TAG}-volta"]
}
