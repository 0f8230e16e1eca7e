package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// startControlPlane starts etcd, the API server, the controllers and the
// scheduler in the control namespace, and returns when the API server is ready.
func startControlPlane(ctx context.Context, bin string) error {
	// Its state ends with the cluster: no need to wait for the disk.
	err := start(control, filepath.Join(bin, "etcd"),
		"--data-dir", folder+"/etcd", "--unsafe-no-fsync", "--log-level", "warn",
		"--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379",
		"--listen-peer-urls", "http://127.0.0.1:2380")
	if err != nil {
		return err
	}
	if err := start(control, filepath.Join(bin, "kube-apiserver"), apiServerFlags()...); err != nil {
		return err
	}
	err = until(ctx, "kube-apiserver", time.Minute, func() error {
		_, err := kubectl(ctx, bin, "", "get", "--raw", "/readyz")
		return err
	})
	if err != nil {
		return err
	}
	if err := start(control, filepath.Join(bin, "kube-controller-manager"), controllerFlags()...); err != nil {
		return err
	}
	return start(control, filepath.Join(bin, "kube-scheduler"),
		"--kubeconfig", pki("scheduler.kubeconfig"), "--leader-elect=false", "--bind-address=127.0.0.1")
}

func apiServerFlags() []string {
	return []string{
		"--etcd-servers=http://127.0.0.1:2379",
		"--bind-address=::", "--secure-port=6443", "--advertise-address=" + controlV4,
		"--tls-cert-file=" + pki("server.crt"), "--tls-private-key-file=" + pki("server.key"),
		"--client-ca-file=" + pki("ca.crt"), "--token-auth-file=" + pki("users.csv"), "--cert-dir=" + pki("made"),
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + pki("accounts.key"), "--service-account-signing-key-file=" + pki("accounts.key"),
		"--service-cluster-ip-range=" + serviceV4 + "," + serviceV6,
		// A lease of its own in etcd would keep a dead API server among the
		// endpoints of Service kubernetes for longer than a test waits.
		"--endpoint-reconciler-type=master-count",
		// Nodes' names are in no DNS, and exec and logs go to the kubelet.
		"--kubelet-preferred-address-types=InternalIP",
	}
}

func controllerFlags() []string {
	return []string{
		"--kubeconfig=" + pki("controllers.kubeconfig"), "--leader-elect=false", "--bind-address=127.0.0.1",
		"--root-ca-file=" + pki("ca.crt"), "--service-account-private-key-file=" + pki("accounts.key"), "--use-service-account-credentials=true",
		"--cluster-signing-cert-file=" + pki("ca.crt"), "--cluster-signing-key-file=" + pki("ca.key"),
		"--allocate-node-cidrs=true", "--configure-cloud-routes=false",
		"--cluster-cidr=" + podsV4 + "," + podsV6, "--node-cidr-mask-size-ipv4=24", "--node-cidr-mask-size-ipv6=64",
		"--service-cluster-ip-range=" + serviceV4 + "," + serviceV6,
		// A test stops the API server for a minute. After the 50 s that are usual, all
		// nodes would be taken for dead when it goes on, and all endpoints for unready.
		"--node-monitor-grace-period=2m",
	}
}

// start a program that outlives us, and that is found again by its namespace. It
// says what it has to say to a file in the folder logs.
func start(namespace, program string, arguments ...string) error {
	log, err := os.Create(folder + "/logs/" + filepath.Base(program) + ".log")
	if err != nil {
		return err
	}
	defer log.Close()
	command := inside(namespace, program, arguments...)
	command.Stdout, command.Stderr = log, log
	command.Dir = folder
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := command.Start(); err != nil {
		return fmt.Errorf("start %s: %w", filepath.Base(program), err)
	}
	return command.Process.Release()
}

// kubectl as an administrator, with a text on its standard input.
func kubectl(ctx context.Context, bin, input string, arguments ...string) (string, error) {
	full := inside(control, filepath.Join(bin, "kubectl"), append([]string{"--kubeconfig", kubeconfig}, arguments...)...)
	command := exec.CommandContext(ctx, full.Path, full.Args[1:]...)
	command.Stdin = strings.NewReader(input)
	text, err := output(command)
	if ctx.Err() != nil {
		return "", errors.Join(err, ctx.Err())
	}
	return text, err
}

// nodeObjects are made before the kubelets start, so that each node has the pod
// ranges that routes lead to. Each is in a zone of its own, as a cloud would say.
func nodeObjects() (manifest string) {
	for _, n := range allNodes() {
		manifest += fmt.Sprintf(`---
apiVersion: v1
kind: Node
metadata: {name: %[1]s, labels: {kubernetes.io/hostname: %[1]s, topology.kubernetes.io/zone: %[4]s}}
spec: {podCIDR: %[2]s, podCIDRs: ["%[2]s", "%[3]s"]}
`, n.name(), n.podsV4(), n.podsV6(), n.zone())
	}
	return manifest
}
