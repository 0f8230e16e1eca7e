package main

import (
	"context"
	"fmt"
	"os"
	"strings"
)

// What `make image` made, from the root of the repository.
const (
	millraceImage    = "dist/millrace-image.tar"
	millraceManifest = "dist/millrace.yaml"
	millracePods     = "dist/millrace-pods.yaml"
	millraceRemoval  = "dist/millrace-remove.yaml"
	millraceTune     = "dist/millrace-tune.yaml"
)

// takeImage puts millrace's image to those that nodes import.
func takeImage() error {
	content, err := os.ReadFile(millraceImage)
	if err != nil {
		return fmt.Errorf("take the image of millrace: %w: make image makes it", err)
	}
	return write(folder+"/images/millrace.tar", string(content), 0o644)
}

// kubeadmConfiguration is the ConfigMap that kubeadm makes for its kube-proxy.
func kubeadmConfiguration() string {
	text := kubeProxyConfiguration("", "", "/var/lib/kube-proxy/kubeconfig.conf")
	return "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: kube-proxy, namespace: kube-system}\ndata:\n  config.conf: |\n    " +
		strings.TrimSpace(strings.ReplaceAll(text, "\n", "\n    ")) + "\n"
}

// install millrace as docs/install.md says for a cluster of kubeadm, and wait until
// each node has it. Beside a kube-proxy it leaves that its ports and its settings.
func install(ctx context.Context, bin string, w wish) error {
	say("millrace")
	name := millraceManifest
	if w.cni == millrace {
		name = millracePods
	}
	manifest, err := os.ReadFile(name)
	if err != nil {
		return fmt.Errorf("install millrace: %w: make image makes it", err)
	}
	addresses := []string{"-n", "kube-system", "create", "configmap", "millrace", "--from-literal=api-server=" + server}
	if w.proxy == millrace {
		addresses = append(addresses, "--from-literal=kube-proxy-config=configmap:kube-system/kube-proxy")
	} else {
		manifest = []byte(strings.ReplaceAll(string(manifest), "            - --kube-proxy-ports\n", ""))
	}
	for _, step := range []struct {
		input     string
		arguments []string
	}{
		{kubeadmConfiguration(), []string{"create", "-f", "-"}},
		{"", addresses},
		{string(manifest), []string{"apply", "-f", "-"}},
		{"", []string{"-n", "kube-system", "rollout", "status", "daemonset/millrace", "--timeout=2m"}},
	} {
		if _, err := kubectl(ctx, bin, step.input, step.arguments...); err != nil {
			return fmt.Errorf("install millrace: %w", err)
		}
	}
	return nil
}
