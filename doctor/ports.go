package doctor

// NodePorts is the range of Services' node ports: kube-apiserver's
// --service-node-port-range where it runs here, else Kubernetes' default where a kubelet
// does; empty where neither is seen.
// https://kubernetes.io/docs/reference/command-line-tools-reference/kube-apiserver/
func (f *Facts) NodePorts() string {
	if f.nodePorts == "" && f.isNode() {
		return "30000-32767"
	}
	return f.nodePorts
}
