package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/util/exec"
	"k8s.io/streaming/pkg/httpstream"
)

// Agent is the pod of millrace's agent on a node.
type Agent struct {
	Node, Namespace, Name string
	server                string
	settings              Settings
}

const (
	// agentLabel is what agents' pods have (deploy/millrace.yaml).
	agentLabel     = "app.kubernetes.io/name=millrace"
	agentContainer = "agent"
	agentProgram   = "/millrace"
	// mostAgents bounds what is read of a cluster.
	mostAgents = 10_000
	// agentsPatience is how long one server may take to list them.
	agentsPatience = 30 * time.Second
)

// Agents are those of all nodes that run. It asks one server after the other, each once,
// and needs the verb list for pods.
func Agents(ctx context.Context, settings Settings) (all []*Agent, err error) {
	err = askEach(settings, "list the agents", func(at *server) (decided bool, err error) {
		all, err = at.agents(ctx, settings)
		return answered(err), err
	})
	return all, err
}

func (s *server) agents(ctx context.Context, settings Settings) (all []*Agent, err error) {
	ctx, cancel := context.WithTimeout(ctx, agentsPatience)
	defer cancel()
	found, err := s.client.Get().AbsPath("/api/v1/pods").Param("labelSelector", agentLabel).Param("limit", fmt.Sprint(mostAgents)).MaxRetries(0).Do(ctx).Get()
	if err != nil {
		return nil, err
	}
	err = meta.EachListItem(found, func(o runtime.Object) error {
		if p, ok := o.(*corev1.Pod); ok && p.Status.Phase == corev1.PodRunning && p.DeletionTimestamp == nil {
			all = append(all, &Agent{p.Spec.NodeName, p.Namespace, p.Name, s.url, settings})
		}
		return nil
	})
	return all, err
}

// Exec runs millrace in the agent's container, until it ends or ctx does, and returns its
// exit status. It needs the verbs get and create for pods/exec. That the status is not 0
// is no error.
func (a *Agent) Exec(ctx context.Context, args []string, stdout, stderr io.Writer) (status int, err error) {
	config, err := access(a.settings)
	if err != nil {
		return 0, err
	}
	config.Host = a.server
	all, err := connect(Settings{Kubeconfig: a.settings.Kubeconfig, Account: a.settings.Account, Servers: []string{a.server}})
	if err != nil {
		return 0, err
	}
	request := all.all[0].client.Post().AbsPath("/api/v1/namespaces", a.Namespace, "pods", a.Name, "exec").
		Param("container", agentContainer).Param("stdout", "true").Param("stderr", "true").Param("command", agentProgram)
	for _, arg := range args {
		request.Param("command", arg)
	}
	stream, err := streamTo(config, request.URL())
	if err == nil {
		err = stream.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: stdout, Stderr: stderr})
	}
	var ended exec.ExitError
	if errors.As(err, &ended) {
		return ended.ExitStatus(), nil
	}
	if err != nil {
		return 0, fmt.Errorf("run millrace in pod %s/%s on node %s: %w", a.Namespace, a.Name, a.Node, err)
	}
	return 0, nil
}

// streamTo is by WebSocket, or by SPDY where a server or what is before it knows no other
// (Kubernetes before 1.30, KEP-4006).
func streamTo(config *rest.Config, address *url.URL) (remotecommand.Executor, error) {
	older, err := remotecommand.NewSPDYExecutor(config, "POST", address)
	if err != nil {
		return nil, err
	}
	newer, err := remotecommand.NewWebSocketExecutor(config, "GET", address.String())
	if err != nil {
		return nil, err
	}
	return remotecommand.NewFallbackExecutor(newer, older, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	})
}
