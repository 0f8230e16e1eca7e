package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/agent/healthcheck"
	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/kube"
	"github.com/millrace/millrace/source/kubeproxy"
)

// standIn is what is said about standing in for a kube-proxy.
type standIn struct {
	// config is where its configuration is: a file, or configmap:NAMESPACE/NAME.
	config string
	// ports are answered where that is so, and by default where there is a config.
	ports bool
	// set says which flags were given.
	set func(name string) bool
}

const (
	configFlag = "kube-proxy-config"
	portsFlag  = "kube-proxy-ports"
	// configVariable stands for the flag, so that deploy/millrace.yaml can leave it to
	// a ConfigMap that may say nothing.
	configVariable = "KUBE_PROXY_CONFIG"
	// configKey is where kubeadm puts the configuration in its ConfigMap.
	configKey = "config.conf"
	// configCopy is the last configuration that was read from the API, in the run
	// folder: an agent that starts while no API server answers goes by it.
	configCopy = "kube-proxy.conf"
)

func (k *standIn) flagConfig(c *cobra.Command) {
	k.set = func(name string) bool { return c.Flags().Changed(name) }
	c.Flags().StringVar(&k.config, configFlag, os.Getenv(configVariable),
		"kube-proxy's configuration, a file or configmap:kube-system/kube-proxy: what of it counts here does, the rest is named ($"+configVariable+")")
}

// Nobody can choose this for a user: beside a kube-proxy that runs on, its ports
// are its own, and whether one will run nobody but the user knows.
func (k *standIn) flagPorts(c *cobra.Command) {
	c.Flags().BoolVar(&k.ports, portsFlag, false,
		"answer on kube-proxy's ports: healthz, metrics and each healthCheckNodePort (default: if there is a --"+configFlag+")")
}

// read reads the configuration. It names the node if no flag does, and is nil where
// nothing of a kube-proxy is asked for. log is nil where nobody waits for an API
// server that does not answer.
func (k *standIn) read(ctx context.Context, at *place, from *wishes, log *slog.Logger) (*agent.KubeProxy, error) {
	settings := kubeproxy.Default()
	if k.config != "" {
		data, err := k.text(ctx, at, from, log)
		if err == nil {
			settings, err = kubeproxy.Read(k.config, data)
		}
		if failed := new(failure); err != nil && !errors.As(err, &failed) {
			err = &failure{exitData, err}
		}
		if err != nil {
			return nil, err
		}
	}
	if settings.NodeName != "" && !k.set("node") {
		at.node = settings.NodeName
	}
	at.nodePorts, at.clusterCIDRs = settings.NodePortRanges(), settings.PodRanges()
	at.tracking, at.trackingFrom = settings.Conntrack, k.config
	at.primary = settings.NodePortPrimary && !settings.NodeIP.IsValid()
	ports := k.ports || k.config != "" && !k.set(portsFlag)
	if !ports && k.config == "" {
		return nil, nil
	}
	return &agent.KubeProxy{
		From: k.config, Notes: settings.Notes, Problems: settings.Problems,
		Ports: ports, Healthz: settings.Healthz, Metrics: settings.Metrics, HardFail: settings.HardFail,
		NodePorts: healthcheck.Places{Ranges: settings.NodePortAddresses, Primary: settings.NodePortPrimary},
		NodeIP:    settings.NodeIP,
	}, nil
}

// look reads the configuration for somebody who changes nothing.
func (k *standIn) look(ctx context.Context, at *place, from *wishes) (notes []string, problems []model.Problem, err error) {
	found, err := k.read(ctx, at, from, nil)
	if found == nil {
		return nil, []model.Problem{}, err
	}
	return found.Notes, append([]model.Problem{}, found.Problems...), err
}

// text is the configuration as it is written.
func (k *standIn) text(ctx context.Context, at *place, from *wishes, log *slog.Logger) ([]byte, error) {
	object, inCluster := strings.CutPrefix(k.config, "configmap:")
	if !inCluster {
		data, err := os.ReadFile(k.config)
		if err != nil {
			return nil, fmt.Errorf("read kube-proxy's configuration: %w", err)
		}
		return data, nil
	}
	namespace, name, whole := strings.Cut(object, "/")
	kubeconfig, ofKube := strings.CutPrefix(from.source, "kube:")
	switch {
	case !whole || namespace == "" || name == "" || strings.Contains(name, "/"):
		return nil, usage("--%s %q: write configmap:NAMESPACE/NAME, such as configmap:kube-system/kube-proxy", configFlag, k.config)
	case !ofKube:
		return nil, usage("--%s %s goes with --source kube: only: name a file instead", configFlag, k.config)
	}
	saved := filepath.Join(at.run, configCopy)
	for wait := 200 * time.Millisecond; ; wait = min(2*wait, 10*time.Second) {
		data, err := kube.ConfigMap(ctx, kube.Settings{Kubeconfig: kubeconfig, Servers: from.servers}, namespace, name, configKey)
		switch {
		case err == nil && log != nil:
			return data, save(saved, data)
		case err == nil || log == nil || !errors.Is(err, kube.ErrNoAnswer):
			return data, err
		}
		if data, errSaved := os.ReadFile(saved); errSaved == nil {
			log.Warn("kube-proxy's configuration is the one that was read last", "copy", saved, "because", err)
			return data, nil
		}
		log.Warn("wait for kube-proxy's configuration", "error", err, "again_in", wait)
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(wait):
		}
	}
}

// save replaces a file at once, so that nobody finds half of it.
func save(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("keep a copy of kube-proxy's configuration: %w", err)
	}
	err := os.WriteFile(path+".new", data, 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return fmt.Errorf("keep a copy of kube-proxy's configuration: %w", err)
	}
	return nil
}

// refusedPort says why one of kube-proxy's ports is not answered; "" if all are.
func refusedPort(s agent.Status) string {
	if s.KubeProxy != nil {
		for _, port := range s.KubeProxy.Ports {
			if port.Error != "" {
				return port.Error
			}
		}
	}
	return ""
}

func printKubeProxy(k *agent.KubeProxyStatus) {
	from := ""
	if k.Config != "" {
		from = "  by " + k.Config
	}
	fmt.Printf("\n%s%s\n", bold("in kube-proxy's place"), from)
	for _, port := range k.Ports {
		if port.Error != "" {
			fmt.Println(" ", red("not answered"), port.Error)
			continue
		}
		fmt.Printf("  answers at %s  %s\n", port.Address, port.For)
	}
	for _, note := range k.Notes {
		fmt.Println("  note:", note)
	}
}
