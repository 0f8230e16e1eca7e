# The few words of millrace; `make help` lists them.

SHELL := /usr/bin/env bash
export PATH := $(PATH):/usr/local/go/bin:/usr/sbin:/sbin

# One set of flags for all, or every package would be compiled once for each.
# Nothing here is in C but the eBPF programs, so a C compiler is not needed.
export CGO_ENABLED := 0
export GOFLAGS := $(GOFLAGS) -trimpath -buildvcs=false

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
# How long `make long` looks for input that breaks a parser, for each of them.
FUZZTIME ?= 2m
# What `make bench` is given.
BENCH ?= services --services 10,1000

# What the image of `make image` is called, where it is to be found by a cluster.
IMAGE ?= ghcr.io/millrace/millrace:$(VERSION)
ARCHITECTURES ?= amd64 arm64

# What `make cluster-up` and `make conformance` are given.
CLUSTER ?= --proxy kube-proxy --mode nftables
CONFORMANCE ?=
# What `make faults` is given: --for 8s, --rounds 300, -o json.
FAULTS ?=
# What `make bench-api` is given.
SCALE ?=

# Packages one after the other (-p 1): their tests load the machine, and some wait
# for a kernel that others keep busy. go vet has been there already.
TESTS := go run ./test/run -allowed-skips test/allowed-skips

.DEFAULT_GOAL := build
.PHONY: help build test demo faults faults-kernel generate check lint bench bench-api test-kernel test-cluster long image cluster-up cluster-down churn moving conformance conformance-table clean

help: ## list these words
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' Makefile

build: ## bin/millrace for this machine; needs Go only
	@test/needs go
	go build -ldflags '-X main.version=$(VERSION)' -o bin/millrace ./cmd/millrace

test: ## everything CI runs; installs what it needs; needs root
	@test/needs root go check bench dns kernel
	@$(MAKE) --no-print-directory build
	@test/check
	@test/kernel/fetch
	$(TESTS) -- -count=1 -p 1 -vet off -timeout 25m ./...
	$(TESTS) -C deploy/image -- -count=1 ./...
	$(TESTS) -C deploy/monitoring -- -count=1 ./...
	@$(MAKE) --no-print-directory test-cluster

demo: ## see it: a shop of Services in a lab on this machine, and the bench table; needs root
	@test/needs root bench
	@$(MAKE) --no-print-directory build
	bin/millrace demo

faults: ## break small networks in every way that is known, and count how often millrace trace names the cause (FAULTS=); needs root
	@test/needs root bench
	@$(MAKE) --no-print-directory build
	bin/millrace lab faults all $(FAULTS)

faults-kernel: ## the same on Debian's kernel in a virtual machine, which has fewer signals: the score (KERNEL_PACKAGE=)
	@test/needs go kernel
	@test/kernel/fetch
	MILLRACE_FAULTS=1 go test -count=1 -timeout 60m -run Faults -v ./test/kernel

generate: ## eBPF objects and their Go, from C; needs the pinned clang
	@test/needs check
	go generate ./...

check: ## gofmt, vet, staticcheck, clang-format, and that what is generated is fresh
	@test/needs go check
	@test/check

lint: ## golangci-lint, which also knows the import law; building it takes minutes
	@test/needs go
	go tool -modfile=tools/go.mod golangci-lint run

bench: ## what a connection to a Service costs here, beside iptables and nftables; needs root
	@test/needs root bench
	@$(MAKE) --no-print-directory build
	bin/millrace bench $(BENCH)

bench-api: ## from a write to a real API server to the first packet, with 10,000 Services, beside kube-proxy (SCALE=); needs root
	@test/needs root go bench
	@$(MAKE) --no-print-directory build
	go build -C test/cluster -o ../../.cache/cluster/cluster .
	.cache/cluster/cluster scale $(SCALE)

test-kernel: ## the tests of the data path on Debian's kernel in a virtual machine (KERNEL_PACKAGE=, MILLRACE_ACCEL=kvm)
	@test/needs go kernel
	@test/kernel/fetch
	$(TESTS) -v -- -count=1 ./test/kernel

test-cluster: ## on a real Kubernetes with millrace: its project's conformance tests, and docs/install.md; takes a cluster that is up down
	@test/needs root go cluster
	@$(MAKE) --no-print-directory image ARCHITECTURES=$$(go env GOARCH)
	MILLRACE_CLUSTER=1 $(TESTS) -C test/cluster -- -count=1 -timeout 40m ./...

long: ## what takes too long for CI: a million names beside CoreDNS, a cluster that goes over from flannel, large labs, all of the lab on Debian's kernel, data races, fuzzing; needs root
	@test/needs root go race bench dns kernel cluster
	@test/kernel/fetch
	MILLRACE_LONG=1 MILLRACE_LAB_LARGE=1 $(TESTS) -- -count=1 -p 1 -timeout 60m ./...
	MILLRACE_LONG=1 MILLRACE_CLUSTER=1 $(TESTS) -C test/cluster -- -count=1 -timeout 90m -run '^(TestNamesAreThoseOfCoreDNS|TestGoingOverFromFlannel|TestFlannelBesideMillrace)$$' .
	CGO_ENABLED=1 $(TESTS) -- -race -count=1 -p 1 -vet off -timeout 20m ./agent/... ./lab ./source/... ./layer/...
	@test/fuzz $(FUZZTIME)

image: $(ARCHITECTURES:%=binary-%) ## dist/millrace-image.tar, and the manifests that name it (IMAGE=, ARCHITECTURES=); needs Go only
	go build -C deploy/image -o ../../.cache/image .
	.cache/image --name '$(IMAGE)' $(foreach a,$(ARCHITECTURES),$a=dist/millrace-$a)

binary-%:
	@test/needs go
	GOARCH=$* go build -ldflags '-s -w -X main.version=$(VERSION)' -o dist/millrace-$* ./cmd/millrace

cluster-up: ## a real Kubernetes in namespaces of this machine, three nodes, dual stack (CLUSTER=); needs root
	@test/needs root go cluster
	@$(if $(findstring millrace,$(CLUSTER)),$(MAKE) --no-print-directory image ARCHITECTURES=$$(go env GOARCH))
	go build -C test/cluster -o ../../.cache/cluster/cluster .
	.cache/cluster/cluster up $(CLUSTER)

cluster-down: ## remove that Kubernetes, whatever is left of it; needs root
	@test/needs root go
	go build -C test/cluster -o ../../.cache/cluster/cluster .
	.cache/cluster/cluster down

churn: ## everything on that cluster altered at once for five minutes, with millrace, and every call counted; needs root
	@test/needs root go cluster
	MILLRACE_INSTALLED=1 MILLRACE_CHURN=5m go test -C test/cluster -count=1 -timeout 20m -run Churn -v .

moving: ## from kube-proxy to millrace and back ten times on that cluster, under load, and what failed; needs root
	@test/needs root go cluster
	@$(MAKE) --no-print-directory image ARCHITECTURES=$$(go env GOARCH)
	MILLRACE_MOVING=1 go test -C test/cluster -count=1 -timeout 30m -run Moving -v .

conformance: ## the Kubernetes project's end-to-end tests of networking, on that cluster (CONFORMANCE=); needs root
	@test/needs root go cluster
	go build -C test/cluster -o ../../.cache/cluster/cluster .
	.cache/cluster/cluster conformance $(CONFORMANCE)

conformance-table: ## what the last `make conformance` found, into the table of docs/conformance.md
	@test/needs go
	go build -C test/cluster -o ../../.cache/cluster/cluster .
	.cache/cluster/cluster record

clean: ## remove what make made
	rm -rf bin dist .cache
