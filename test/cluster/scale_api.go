package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// The addresses of Services and endpoints. An endpoint's says whose it is and how
// often it was replaced, so that an answer does.
const (
	mostServices   = 30_000
	endpointRange  = "10.128.0.0/10"
	generations    = 32
	generationSize = 1 << 17 // addresses
	servicePort    = 80
	endpointPort   = 8080
)

func clusterIP(service int) netip.Addr {
	n := service + 256 // the lowest are the API server's
	return netip.AddrFrom4([4]byte{10, 96, byte(n >> 8), byte(n)})
}

// endpointsOf is how many endpoints a Service has.
func endpointsOf(service int) int { return 2 + service%3 }

func endpoint(service, number, generation int) netip.Addr {
	n := generation*generationSize + service*4 + number
	return netip.AddrFrom4([4]byte{10, 128 + byte(n>>16), byte(n >> 8), byte(n)})
}

// whose is the inverse of endpoint, but for the number.
func whose(address netip.Addr) (service, generation int) {
	b := address.As4()
	n := int(b[1]-128)<<16 | int(b[2])<<8 | int(b[3])
	return n % generationSize / 4, n / generationSize
}

type object map[string]any

func serviceName(i int) string { return fmt.Sprintf("shop-%05d", i) }

// serviceObject is a Service as a chart makes it.
func serviceObject(i int) object {
	name := serviceName(i)
	return object{
		"apiVersion": "v1", "kind": "Service",
		"metadata": object{
			"name": name, "namespace": "default",
			"labels":      object{"app.kubernetes.io/name": name, "app.kubernetes.io/instance": "shop", "app.kubernetes.io/managed-by": "Helm", "helm.sh/chart": "shop-1.4.2"},
			"annotations": object{"meta.helm.sh/release-name": "shop", "meta.helm.sh/release-namespace": "default"},
		},
		"spec": object{
			"clusterIP": clusterIP(i).String(),
			"selector":  object{"app.kubernetes.io/name": name, "app.kubernetes.io/instance": "shop"},
			"ports":     []object{{"name": "http", "port": servicePort, "targetPort": endpointPort}},
		},
	}
}

// sliceObject is the EndpointSlice of a Service as the controller writes it.
func sliceObject(i, generation int) object {
	name := serviceName(i)
	var endpoints []object
	for number := range endpointsOf(i) {
		pod := fmt.Sprintf("%s-6d4cf56db6-%02d%03d", name, generation, number)
		endpoints = append(endpoints, object{
			"addresses":  []string{endpoint(i, number, generation).String()},
			"conditions": object{"ready": true, "serving": true, "terminating": false},
			"nodeName":   fmt.Sprintf("worker-%d", (i+number)%100), "zone": fmt.Sprintf("zone-%d", (i+number)%3),
			"targetRef": object{"kind": "Pod", "namespace": "default", "name": pod, "uid": fmt.Sprintf("0b2b6a33-2a9c-4d52-8f4e-%06d%06d", i, generation)},
		})
	}
	return object{
		"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
		"metadata": object{
			"name": name + "-x7x2q", "generateName": name + "-", "namespace": "default",
			"labels": object{
				"kubernetes.io/service-name": name, "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
				"app.kubernetes.io/name": name, "app.kubernetes.io/instance": "shop", "app.kubernetes.io/managed-by": "Helm", "helm.sh/chart": "shop-1.4.2",
			},
			"annotations": object{"endpoints.kubernetes.io/last-change-trigger-time": "2026-11-01T12:00:00Z"},
			"ownerReferences": []object{{"apiVersion": "v1", "kind": "Service", "name": name, "controller": true, "blockOwnerDeletion": true,
				"uid": fmt.Sprintf("5c1c7e1e-94a0-4a3b-9d3c-%012d", i)}},
		},
		"addressType": "IPv4",
		"ports":       []object{{"name": "http", "protocol": "TCP", "port": endpointPort}},
		"endpoints":   endpoints,
	}
}

const slicesPath = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"

// apiServer is the one that is measured with, and what was written to it.
type apiServer struct {
	client *http.Client
	// generation of each Service's endpoints.
	generation []int
}

// startAPIServer starts etcd and an API server here, in the namespace that this
// process is in. They end with it.
func startAPIServer(ctx context.Context, bin string, services int) (*apiServer, error) {
	authority, err := scaleCredentials()
	if err != nil {
		return nil, err
	}
	etcd := []string{"--data-dir", scaleFolder + "/etcd", "--unsafe-no-fsync", "--log-level", "warn",
		"--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379",
		"--listen-peer-urls", "http://127.0.0.1:2380", "--quota-backend-bytes", "4294967296"}
	if _, err := launch(exec.Command(filepath.Join(bin, "etcd"), etcd...), "etcd"); err != nil {
		return nil, err
	}
	if _, err := launch(exec.Command(filepath.Join(bin, "kube-apiserver"), scaleServerFlags()...), "kube-apiserver"); err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(authority))
	s := &apiServer{
		client:     &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}},
		generation: make([]int, services),
	}
	return s, until(ctx, "kube-apiserver", time.Minute, func() error { return s.call(ctx, http.MethodGet, "/readyz", nil) })
}

// scaleServerFlags are those of any API server with tokens; who may read what is
// not measured here.
func scaleServerFlags() []string {
	pki := scaleFolder + "/pki/"
	return []string{
		"--etcd-servers=http://127.0.0.1:2379", "--bind-address=0.0.0.0", "--secure-port=6443", "--advertise-address=" + controlV4,
		"--tls-cert-file=" + pki + "server.crt", "--tls-private-key-file=" + pki + "server.key",
		"--token-auth-file=" + pki + "users.csv", "--cert-dir=" + pki + "made", "--authorization-mode=RBAC",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + pki + "server.key", "--service-account-signing-key-file=" + pki + "server.key",
		"--service-cluster-ip-range=" + serviceV4, "--endpoint-reconciler-type=master-count",
	}
}

// scaleCredentials writes certificates, a token and a kubeconfig with it. It returns
// the authority's certificate.
func scaleCredentials() (string, error) {
	authority, err := newAuthority()
	if err != nil {
		return "", fmt.Errorf("make certificates: %w", err)
	}
	certificate, key, err := authority.issue()
	if err != nil {
		return "", fmt.Errorf("make certificates: %w", err)
	}
	return authority.text, errors.Join(
		write(scaleFolder+"/pki/server.crt", certificate, 0o600),
		write(scaleFolder+"/pki/server.key", key, 0o600),
		write(scaleFolder+"/pki/users.csv", adminToken+",admin,admin,system:masters\n", 0o600),
		write(scaleFolder+"/kubeconfig", kubeconfigOf(authority.text, adminToken), 0o600))
}

// call sends an object, in JSON as kubectl does; nil is none.
func (s *apiServer) call(ctx context.Context, method, path string, o object) error {
	body, err := json.Marshal(o)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, method, "https://127.0.0.1:6443"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("Authorization", "Bearer "+adminToken)
	request.Header.Set("Content-Type", "application/json")
	response, err := s.client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode >= 300 {
		err = fmt.Errorf("%s %s: %s: %.300s", method, path, response.Status, text)
	}
	return err
}

// fill writes the node, and all Services with their endpoints.
func (s *apiServer) fill(ctx context.Context) error {
	node := object{"apiVersion": "v1", "kind": "Node", "metadata": object{"name": "node-1"},
		"spec":   object{"podCIDR": "10.244.1.0/24", "podCIDRs": []string{"10.244.1.0/24"}},
		"status": object{"addresses": []object{{"type": "InternalIP", "address": nodeAddress}, {"type": "Hostname", "address": "node-1"}}}}
	if err := s.call(ctx, http.MethodPost, "/api/v1/nodes", node); err != nil {
		return err
	}
	return s.each(ctx, "Services", func(i int) error {
		if err := s.call(ctx, http.MethodPost, "/api/v1/namespaces/default/services", serviceObject(i)); err != nil {
			return err
		}
		return s.call(ctx, http.MethodPost, slicesPath, sliceObject(i, 0))
	})
}

// each does something for every Service, at most 16 at a time, and says how far it
// is.
func (s *apiServer) each(ctx context.Context, what string, do func(int) error) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var next, done atomic.Int64
	var writers sync.WaitGroup
	for range 16 {
		writers.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(s.generation) && ctx.Err() == nil; i = int(next.Add(1)) - 1 {
				if err := do(i); err != nil {
					stop(err)
				}
				if n := done.Add(1); n%2000 == 0 {
					say("%d %s of %d", n, what, len(s.generation))
				}
			}
		})
	}
	writers.Wait()
	return context.Cause(ctx)
}

// replace all endpoints of a Service by others.
func (s *apiServer) replace(ctx context.Context, service int) error {
	s.generation[service] = (s.generation[service] + 1) % generations
	path := slicesPath + "/" + serviceName(service) + "-x7x2q"
	return s.call(ctx, http.MethodPut, path, sliceObject(service, s.generation[service]))
}

// launch starts a program that says what it has to say to a file in the folder logs.
func launch(command *exec.Cmd, name string) (*exec.Cmd, error) {
	if err := os.MkdirAll(scaleFolder+"/logs", 0o755); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(scaleFolder, "logs", name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	if command.Stdout == nil {
		command.Stdout = log
	}
	command.Stderr = log
	if err := command.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return command, nil
}

// endOfLog is the end of what a program said.
func endOfLog(name string) string {
	content, err := os.ReadFile(filepath.Join(scaleFolder, "logs", name+".log"))
	if err != nil {
		return err.Error()
	}
	return lastLines(string(content), 5)
}
