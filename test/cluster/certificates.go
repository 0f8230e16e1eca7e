package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"time"
)

// Who may talk to the API server, each with a token that is its name: nobody
// outside the cluster's namespaces can reach it.
func users() (lines string) {
	lines = adminToken + ",admin,admin,system:masters\n" +
		proxyToken + ",system:kube-proxy,kube-proxy\n" +
		"controllers,system:kube-controller-manager,controllers\n" +
		"scheduler,system:kube-scheduler,scheduler\n"
	for _, n := range allNodes() {
		lines += fmt.Sprintf("%s,system:node:%s,%s,system:nodes\n", n.name(), n.name(), n.name())
	}
	return lines
}

// credentials writes the authority, the API server's certificate, the key that
// service accounts are signed with, the tokens, and a kubeconfig for each user.
func credentials() error {
	authority, err := newAuthority()
	if err != nil {
		return fmt.Errorf("make certificates: %w", err)
	}
	certificate, key, err := authority.issue()
	if err != nil {
		return fmt.Errorf("make certificates: %w", err)
	}
	authorityKey, err := keyText(authority.key)
	if err != nil {
		return fmt.Errorf("make certificates: %w", err)
	}
	files := map[string]string{
		"ca.crt": authority.text, "ca.key": authorityKey,
		"server.crt": certificate, "server.key": key,
		"accounts.key": key, // it signs, and is public as a part of server.crt
		"users.csv":    users(),
	}
	for name, content := range files {
		if err := write(pki(name), content, 0o600); err != nil {
			return err
		}
	}
	tokens := map[string]string{
		kubeconfig:                    adminToken,
		pki("kube-proxy.kubeconfig"):  proxyToken,
		pki("controllers.kubeconfig"): "controllers",
		pki("scheduler.kubeconfig"):   "scheduler",
	}
	for _, n := range allNodes() {
		tokens[pki(n.name()+".kubeconfig")] = n.name()
	}
	for file, token := range tokens {
		if err := write(file, kubeconfigOf(authority.text, token), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func pki(name string) string { return folder + "/pki/" + name }

func kubeconfigOf(authority, token string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: millrace-cluster
contexts:
- name: millrace-cluster
  context: {cluster: millrace-cluster, user: %[1]s}
clusters:
- name: millrace-cluster
  cluster: {server: "%[2]s", certificate-authority-data: %[3]s}
users:
- name: %[1]s
  user: {token: %[1]s}
`, token, server, base64.StdEncoding.EncodeToString([]byte(authority)))
}

type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	text        string
}

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := certificate("millrace-cluster")
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParseCertificate(der)
	return &authority{parsed, key, text("CERTIFICATE", der)}, err
}

// issue the certificate of the API server, under each name that it is called by.
func (a *authority) issue() (certificateText, key string, err error) {
	template := certificate("kube-apiserver")
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	template.DNSNames = []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}
	for _, address := range []string{controlV4, controlV6, kubernetesV4, kubernetesV6, "127.0.0.1", "::1"} {
		template.IPAddresses = append(template.IPAddresses, net.ParseIP(address))
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, private.Public(), a.key)
	if err != nil {
		return "", "", err
	}
	key, err = keyText(private)
	return text("CERTIFICATE", der), key, err
}

func certificate(name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().AddDate(1, 0, 0),
	}
}

func keyText(key *ecdsa.PrivateKey) (string, error) {
	der, err := x509.MarshalECPrivateKey(key)
	return text("EC PRIVATE KEY", der), err
}

func text(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}
