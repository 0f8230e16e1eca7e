package main

import (
	"context"
	"fmt"
	"os"
)

// What `make image` made, from the root of the repository.
const (
	millraceImage    = "dist/millrace-image.tar"
	millraceManifest = "dist/millrace.yaml"
	millraceRemoval  = "dist/millrace-remove.yaml"
)

// takeImage puts millrace's image to those that nodes import.
func takeImage() error {
	content, err := os.ReadFile(millraceImage)
	if err != nil {
		return fmt.Errorf("take the image of millrace: %w: make image makes it", err)
	}
	return write(folder+"/images/millrace.tar", string(content), 0o644)
}

// install millrace as docs/install.md says, and wait until each node has it.
func install(ctx context.Context, bin string) error {
	for _, arguments := range [][]string{
		{"-n", "kube-system", "create", "configmap", "millrace", "--from-literal=api-server=" + server},
		{"apply", "-f", millraceManifest},
		{"-n", "kube-system", "rollout", "status", "daemonset/millrace", "--timeout=2m"},
	} {
		if _, err := kubectl(ctx, bin, "", arguments...); err != nil {
			return fmt.Errorf("install millrace: %w", err)
		}
	}
	return nil
}
